"use strict";
(() => {
  const SVG = "http://www.w3.org/2000/svg";
  const COLOURS = [[68, 10, 85], [65, 68, 135], [42, 120, 142], [34, 168, 132], [122, 209, 81], [253, 231, 37]];
  const TINT_ALPHA = 120;
  const MARKS = { keep: "\u2713", reject: "\u2715" }, WORDS = { keep: "kept", reject: "rejected" };
  const NAMES = new Intl.Collator(undefined, { numeric: true });
  const byId = (id) => document.getElementById(id);

  const facts = JSON.parse(byId("facts").textContent);
  const items = Array.from(document.querySelectorAll("script.card-data"), (node) => JSON.parse(node.textContent));
  const byNumber = new Map(items.map((item) => [item.number, item]));
  const controls = Object.fromEntries(
    ["sort", "verdict", "clearness", "decision", "least", "find"].map((name) => [name, byId(name)]));
  const rgb = (index) => facts.colours[index % facts.colours.length];
  const paint = (index) => `rgb(${rgb(index).join(" ")})`;
  const decided = new Map();  // by image, one a box: "keep", "reject" or null
  let elsewhere = [];  // decisions on images that are not on this page
  const past = [];  // images with what was decided on them before, to undo
  let shown = [];
  let open = null, opened = null, selected = 0;

  // Small builders

  function element(name, attributes = {}, ...children) {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  }

  function shape(name, attributes = {}, ...children) {
    const made = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  }

  function rectangle(box, attributes) {
    const [x1, y1, x2, y2] = box;
    const size = { width: Math.max(0, x2 - x1), height: Math.max(0, y2 - y1) };
    return shape("rect", { x: x1, y: y1, ...size, ...attributes });
  }

  // What is known of an image, in words

  const counted = (count, name) => `${count} ${name}${count === 1 ? "" : name.endsWith("x") ? "es" : "s"}`;
  const score = (item) => item.scores[0] ?? null;
  const hasTruth = (item) => typeof item.hit === "boolean";
  const verdict = (item) => (item.hit ? "hit" : "miss");
  // As `score_text` has it in Python: two decimals of three, halves up.
  const written = (value) =>
    value === null ? "no score" : (Math.floor((Math.round(value * 1000) + 5) / 10) / 100).toFixed(2);
  const isUnclear = (item) => score(item) !== null && score(item) < Number(controls.least.value);

  function summary(item) {
    return [item.name, counted(item.boxes.length, "box"), score(item) === null ? "no score" : `score ${written(score(item))}`]
      .concat(hasTruth(item) ? [verdict(item)] : [], tally(item) || [], item.note ? [item.note] : []).join(", ");
  }

  const decisionsOn = (item) => decided.get(item) ?? item.boxes.map(() => null);
  const countOf = (list, wanted) => list.filter((one) => one === wanted).length;

  function tally(item) {
    return ["reject", "keep"].map((wanted) => [countOf(decisionsOn(item), wanted), WORDS[wanted]])
      .filter(([count]) => count).map((part) => part.join(" ")).join(", ");
  }

  // Pictures: base64 in the page until somebody comes near, then a blob until they leave

  function bytesOf(base64) {
    const text = atob(base64), bytes = new Uint8Array(text.length);
    for (let index = 0; index < bytes.length; index += 1) bytes[index] = text.charCodeAt(index);
    return bytes;
  }

  function pictureUrl(item) {
    const text = byId(`jpeg-${item.number}`).textContent;
    if (!text) return null;
    return URL.createObjectURL(new Blob([bytesOf(text)], { type: "image/jpeg" }));
  }

  function picture(item) {
    const url = pictureUrl(item);
    if (url === null) return element("span", { class: "lost" }, item.note || "no picture");
    return element("img", { src: url, alt: summary(item), decoding: "async", draggable: "false" });
  }

  function release(holder) {
    for (const image of holder.querySelectorAll("img")) URL.revokeObjectURL(image.src);
    holder.replaceChildren();
  }

  // What is drawn over a picture

  function boxShape(item, index, large) {
    const decision = decisionsOn(item)[index], box = item.boxes[index], [x1, y1, x2, y2] = box;
    const names = [index ? "" : "first", decision ?? "", large && item.boxes.length > 1 && index === selected ? "selected" : ""];
    const look = { stroke: paint(index), "stroke-dasharray": facts.dashes[index % facts.dashes.length].join(" ") };
    const group = shape("g", { class: names.join(" ") });
    group.append(rectangle(box, { class: "halo" }), rectangle(box, { class: "box", ...look }));
    if (decision === "reject") {
      for (const kind of ["halo", "box"]) {
        group.append(shape("path", { class: kind, stroke: paint(index), d: `M${x1} ${y1}L${x2} ${y2}M${x1} ${y2}L${x2} ${y1}` }));
      }
    }
    const text = [large ? index + 1 : "", MARKS[decision] ?? ""].join(" ").trim();
    if (text) group.append(...labelShapes(item, index, text, large ? 1 : 2.2));
    return group;
  }

  function labelShapes(item, index, text, scale) {
    const unit = scale * Math.max(...item.size) / 100;
    const high = 4 * unit, wide = (1.6 + 2 * text.length) * unit;
    const x = Math.max(0, Math.min(item.boxes[index][0], item.size[0] - wide));
    const y = Math.max(0, Math.min(item.boxes[index][1], item.size[1] - high));
    return [
      shape("rect", { class: "label", fill: paint(index), x, y, width: wide, height: high }),
      shape("text", { x: x + wide / 2, y: y + 3.1 * unit, "font-size": 3.2 * unit, "text-anchor": "middle" }, text),
    ];
  }

  function overlay(item, maps = null) {
    const [width, height] = item.size, large = maps !== null;
    const top = shape("svg", { viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" });
    if (large && item.truth) {
      const lines = item.truth.flatMap((box) => [rectangle(box, { class: "halo" }), rectangle(box, {})]);
      top.append(shape("g", { class: "truth" }, ...lines));
    }
    if (maps?.candidates) top.append(shape("g", { class: "candidates" }, ...maps.candidates.map(candidateShape)));
    const order = item.boxes.map((_, index) => index).reverse();
    top.append(shape("g", { class: "boxes" }, ...order.map((index) => boxShape(item, index, large))));
    if (large && item.patch) top.append(shape("g", { class: "seeds" }, ...item.seeds.map((at) => seedShape(item, at))));
    return top;
  }

  function candidateShape(candidate) {
    const title = shape("title", {}, `candidate, score ${written(candidate[4])}`);
    return shape("g", {}, title, rectangle(candidate, { class: "halo" }), rectangle(candidate, {}));
  }

  function seedShape(item, [row, column]) {
    const [wide, high] = item.patch, [width, height] = item.size;
    const right = Math.min(width, (column + 1) * wide), bottom = Math.min(height, (row + 1) * high);
    return rectangle([column * wide, row * high, right, bottom], {});
  }

  // The grid

  const cards = new Map(items.map((item) => [item, makeCard(item)]));

  function makeCard(item) {
    const about = element("span", { class: "about" }, element("bdi", { title: item.name }, item.name));
    if (hasTruth(item)) about.append(element("span", { class: verdict(item) }, verdict(item)));
    if (item.boxes.length > 1) about.append(element("small", {}, `${item.boxes.length} boxes`));
    about.append(element("b", {}, written(score(item))));
    const thumb = element("span", { class: "thumb" });
    const button = element("button", { type: "button", class: "card", "aria-label": summary(item) }, thumb, about);
    about.append(element("small", { class: "tally" }));
    button.addEventListener("click", () => show(item));
    const card = element("li", { "data-number": item.number }, button);
    card.item = item;
    return card;
  }

  const near = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      const thumb = target.querySelector(".thumb");
      if (isIntersecting === thumb.hasChildNodes()) continue;
      if (isIntersecting) thumb.append(picture(target.item), overlay(target.item));
      else release(thumb);
    }
  }, { rootMargin: "700px 0px" });

  const ORDERS = {
    run: (a, b) => a.number - b.number,
    name: (a, b) => NAMES.compare(a.name, b.name) || a.number - b.number,
    high: (a, b) => (score(b) ?? -1) - (score(a) ?? -1) || a.number - b.number,
    low: (a, b) => (score(a) ?? 2) - (score(b) ?? 2) || a.number - b.number,
  };

  function fits(item) {
    const wanted = controls.verdict.value, clearness = controls.clearness.value;
    if (wanted !== "all" && !(hasTruth(item) && verdict(item) === wanted)) return false;
    const decision = controls.decision.value === "open" ? null : controls.decision.value;
    if (decision !== "any" && !decisionsOn(item).includes(decision)) return false;
    if (clearness !== "any" && (score(item) === null || isUnclear(item) !== (clearness === "unclear"))) return false;
    return item.name.toLowerCase().includes(controls.find.value.trim().toLowerCase());
  }

  function arrange() {
    shown = items.filter(fits).sort(ORDERS[controls.sort.value]);
    byId("least-shown").textContent = Number(controls.least.value).toFixed(2);
    for (const item of items) cards.get(item).classList.toggle("unclear", isUnclear(item));
    byId("grid").replaceChildren(...shown.map((item) => cards.get(item)));
    byId("none").hidden = shown.length > 0 || !items.length;
    byId("count").textContent = shown.length === items.length
      ? counted(items.length, "image") : `${shown.length} of ${counted(items.length, "image")}`;
  }

  // Decisions: kept in this browser, and saved as the file that `lostreg export --decisions` takes

  const idOf = (item) => item.id ?? item.name;
  const storage = `${facts.decisions.format} ${facts.key}`;
  let isKept = true;

  function recall() {
    try {
      return take(JSON.parse(localStorage.getItem(storage))?.images ?? []).known;
    } catch {
      isKept = false;
      return [];
    }
  }

  const isEntry = ({ image_id, fingerprint, decisions }) =>
    ["string", "number"].includes(typeof image_id) && typeof fingerprint === "string"
    && Array.isArray(decisions) && decisions.every((one) => one === null || one === "keep" || one === "reject");

  // Decisions of a file or of the browser: the images that they are on, and how many have other boxes by now, or are not
  // on this page.
  function take(entries) {
    if (!entries.every(isEntry)) throw new TypeError("no decisions");
    const byImage = new Map(items.map((item) => [idOf(item), item]));
    const ids = new Set(entries.map((entry) => entry.image_id)), known = [];
    const [here, beyond] = [true, false].map((wanted) => entries.filter((entry) => byImage.has(entry.image_id) === wanted));
    elsewhere = elsewhere.filter((entry) => !ids.has(entry.image_id)).concat(beyond);
    for (const entry of here) {
      const item = byImage.get(entry.image_id);
      if (item.fingerprint !== entry.fingerprint || item.boxes.length !== entry.decisions.length) continue;
      decided.set(item, entry.decisions);
      known.push(item);
    }
    return { known, changed: here.length - known.length, beyond: beyond.length };
  }

  async function load(file) {
    let told = "no file of decisions that this page saves";
    try {
      const { format, images } = JSON.parse(await file.text());
      const ids = new Set(items.map(idOf));
      if (format === facts.decisions.format && !images.some((entry) => ids.has(entry.image_id))) {
        told = "on none of the images of this page, so nothing is taken";
      } else if (format === facts.decisions.format) {
        const { known, changed, beyond } = take(images);
        past.length = 0;
        known.forEach(update);
        if (open) mark();
        keep();
        told = `decisions on ${counted(known.length, "image")}`
          + (changed ? `; left out, because boxes are others by now: ${counted(changed, "image")}` : "")
          + (beyond ? `; not on this page: ${counted(beyond, "image")}` : "");
      }
    } catch {
      // told as it is
    }
    byId("loaded").textContent = `${file.name}: ${told}`;
  }

  function record() {
    const here = items.filter((item) => decisionsOn(item).some(Boolean)).map((item) =>
      ({ image_id: idOf(item), fingerprint: item.fingerprint, decisions: decisionsOn(item) }));
    return { ...facts.decisions, images: [...here, ...elsewhere] };
  }

  // Decides on boxes of an image, by their places; what is so already is taken back.
  function decide(item, places, wanted) {
    const before = decisionsOn(item), isSo = places.every((place) => before[place] === wanted);
    past.push([item, before]);
    set(item, before.map((one, place) => (places.includes(place) ? (isSo ? null : wanted) : one)));
  }

  function undo() {
    if (!past.length) return;
    const [item, before] = past.pop();
    set(item, before);
    if (view.open && open !== item) show(item);
    if (!view.open) cards.get(item).firstElementChild.focus();
  }

  function set(item, decisions) {
    decided.set(item, decisions);
    update(item);
    if (open === item) mark();
    byId("told").textContent = decisions.map((one, place) => `box ${place + 1} ${WORDS[one] ?? "undecided"}`).join(", ");
    keep();
  }

  function keep() {
    try {
      localStorage.setItem(storage, JSON.stringify(record()));
    } catch {
      isKept = false;
    }
    tellDecided();
  }

  function update(item) {
    const card = cards.get(item);
    card.querySelector("svg")?.replaceWith(overlay(item));
    card.querySelector(".tally").textContent = tally(item);
    card.firstElementChild.setAttribute("aria-label", summary(item));
    card.querySelector("img")?.setAttribute("alt", summary(item));
  }

  function tellDecided() {
    const all = record().images.flatMap((entry) => entry.decisions);
    const told = ["reject", "keep"].map((wanted) => `${countOf(all, wanted)} ${WORDS[wanted]}`).join(", ");
    byId("decided").textContent = told + (isKept ? "" : "; this browser keeps nothing: save before you leave");
    byId("undo").disabled = !past.length;
    byId("save").disabled = byId("forget").disabled = !all.some(Boolean);
  }

  function save() {
    const text = `${JSON.stringify(record(), null, 1)}\n`;
    const href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
    element("a", { href, download: "decisions.json" }).click();
    setTimeout(() => URL.revokeObjectURL(href), 10000);
  }

  function forget() {
    if (!confirm("Forget all decisions on this run?")) return;
    const items = [...decided.keys()];
    elsewhere = [];
    past.length = 0;
    decided.clear();
    items.forEach(update);
    keep();
  }

  // What a key decides, on which boxes; whether it was one of these keys.
  function decideByKey(key, item, places) {
    const wanted = { x: "reject", k: "keep" }[key.toLowerCase()];
    const isUndo = key.toLowerCase() === "u";
    if (wanted) decide(item, places, wanted);
    if (isUndo) undo();
    return Boolean(wanted) || isUndo;
  }

  // The large view

  const view = byId("view");
  const panels = ["photo", "degrees", "objectness"].map((name) => byId(name).firstElementChild);

  function show(item) {
    open = item;
    selected = 0;
    byId("told").textContent = "";
    const maps = opened = JSON.parse(byId(`maps-${item.number}`).textContent);
    describe(item);
    for (const panel of panels) {
      release(panel);
      panel.style.setProperty("--ratio", item.size[0] / item.size[1]);
    }
    panels[0].append(picture(item), ...maskCanvases(maps.masks ?? []), overlay(item, maps));
    for (const [name, draw] of [["degrees", drawDegrees], ["objectness", drawObjectness]]) {
      byId(name).hidden = !maps[name];
      if (maps[name]) draw(item, maps, byId(name));
    }
    const there = ["masks", "candidates", "degrees", "objectness"].map((name) => [name, Boolean(maps[name])]);
    offer({ truth: hasTruth(item), seeds: Boolean(item.patch), ...Object.fromEntries(there) });
    const isInTable = byId("boxes").contains(document.activeElement);
    fillTable(item, maps.candidates ?? []);
    if (isInTable) byId("next").focus();  // its button is gone, and with it the keys
    history.replaceState(null, "", `#${item.number}`);
    if (!view.open) view.showModal();
    view.scrollTop = 0;
  }

  // Shows which box is selected, and what was decided.
  function mark() {
    for (const panel of panels) panel.querySelector("svg")?.replaceWith(overlay(open, opened));
    [...byId("boxes").tBodies[0].rows].forEach((row, place) => {
      row.classList.toggle("selected", open.boxes.length > 1 && place === selected);
      row.setAttribute("aria-current", place === selected);
      for (const button of row.querySelectorAll("button")) {
        button.setAttribute("aria-pressed", decisionsOn(open)[place] === button.value);
      }
    });
  }

  function select(place) {
    selected = (place + open.boxes.length) % open.boxes.length;
    mark();
    byId("told").textContent = `box ${selected + 1} of ${open.boxes.length}, ${WORDS[decisionsOn(open)[selected]] ?? "undecided"}`;
  }

  function describe(item) {
    byId("view-name").replaceChildren(element("bdi", {}, item.name));
    if (hasTruth(item)) byId("view-name").append(" ", element("span", { class: verdict(item) }, verdict(item)));
    if (isUnclear(item)) byId("view-name").append(" ", element("small", {}, "no clear object"));
    const place = shown.indexOf(item);
    byId("view-place").textContent = place < 0 ? "" : `${place + 1} of ${shown.length}`;
    byId("view-note").hidden = !item.note;
    byId("view-note").textContent = item.note ?? "";
  }

  function offer(there) {
    for (const label of document.querySelectorAll(".layers label")) {
      label.hidden = there[label.dataset.layer] === false;
    }
  }

  function maskCanvases(masks) {
    const made = [];
    masks.forEach((mask, index) => {
      if (mask) made.unshift(maskCanvas(mask, rgb(index)));
    });
    return made;
  }

  function maskCanvas({ size: [height, width], runs }, tint) {
    const canvas = element("canvas", { class: "mask", width, height, "aria-hidden": "true" });
    const context = canvas.getContext("2d"), image = context.createImageData(width, height);
    let place = 0;
    runs.forEach((length, index) => {
      for (const end = place + length; place < end; place += 1) {
        if (index % 2) image.data.set([...tint, TINT_ALPHA], 4 * ((place % height) * width + Math.floor(place / height)));
      }
    });
    context.putImageData(image, 0, 0);
    return canvas;
  }

  function readDegrees({ grid: [rows, columns], degrees: text }) {
    const bytes = bytesOf(text);
    const wide = bytes.length / (rows * columns), data = new DataView(bytes.buffer);
    return Array.from({ length: rows * columns }, (_, index) =>
      wide === 2 ? data.getUint16(2 * index, true) : data.getUint32(4 * index, true));
  }

  function colour(share) {
    const place = share * (COLOURS.length - 1), low = Math.min(Math.floor(place), COLOURS.length - 2);
    return COLOURS[low].map((value, index) => value + (COLOURS[low + 1][index] - value) * (place - low));
  }

  function drawDegrees(item, maps, figure) {
    const values = readDegrees(maps);
    const lowest = values.reduce((a, b) => Math.min(a, b)), highest = values.reduce((a, b) => Math.max(a, b));
    drawMap(item, maps, figure, values, [lowest, highest], "Degree map", String);
    figure.querySelector(".lowest").textContent = `degree ${lowest}, object-like`;
    figure.querySelector(".highest").textContent = `${highest} of ${values.length - 1}`;
  }

  function drawObjectness(item, maps, figure) {
    const percent = (value) => `${(value / 2.55).toFixed(0)} %`;
    drawMap(item, maps, figure, bytesOf(maps.objectness), [0, 255], "Objectness map", percent);
    figure.querySelector(".lowest").textContent = "objectness 0 %";
    figure.querySelector(".highest").textContent = "100 %, an object";
  }

  // Each patch as a colour between those of the lowest and highest value; beneath the pointer, its value in words.
  function drawMap(item, maps, figure, values, [lowest, highest], name, inWords) {
    const [rows, columns] = maps.grid, panel = figure.firstElementChild, under = figure.querySelector(".under");
    const label = `${name} of ${item.name}: ${rows} by ${columns} patches, from ${inWords(lowest)} to ${inWords(highest)}`;
    const canvas = element("canvas", { class: "map", width: columns, height: rows, role: "img", "aria-label": label });
    const context = canvas.getContext("2d"), image = context.createImageData(columns, rows);
    const span = Math.max(1, highest - lowest);
    values.forEach((value, index) => image.data.set([...colour((value - lowest) / span), 255], 4 * index));
    context.putImageData(image, 0, 0);
    canvas.style.width = `${(100 * columns * item.patch[0]) / item.size[0]}%`;
    canvas.style.height = `${(100 * rows * item.patch[1]) / item.size[1]}%`;
    panel.append(canvas, overlay(item, maps));
    under.textContent = "";
    panel.onpointermove = (event) => {
      const frame = canvas.getBoundingClientRect();
      const column = Math.floor(((event.clientX - frame.left) / frame.width) * columns);
      const row = Math.floor(((event.clientY - frame.top) / frame.height) * rows);
      const value = column >= 0 && column < columns ? values[row * columns + column] : undefined;
      under.textContent = value === undefined ? "" : `row ${row}, column ${column}: ${inWords(value)}`;
    };
    panel.onpointerleave = () => { under.textContent = ""; };
  }

  const area = ([x1, y1, x2, y2]) => Math.max(0, x2 - x1) * Math.max(0, y2 - y1);

  function overlap(a, b) {
    const common = area([Math.max(a[0], b[0]), Math.max(a[1], b[1]), Math.min(a[2], b[2]), Math.min(a[3], b[3])]);
    const union = area(a) + area(b) - common;
    return union > 0 ? common / union : 0;
  }

  function fillTable(item, candidates) {
    for (const cell of byId("boxes").querySelectorAll(".judged")) cell.hidden = !item.truth;
    const [chosen, others] = byId("boxes").tBodies;
    chosen.replaceChildren(...item.boxes.map((box, index) => {
      const row = tableRow(item, String(index + 1), item.scores[index], box);
      row.querySelector(".key").style.background = paint(index);
      row.cells[1].append(...["reject", "keep"].map((wanted) => decisionButton(item, index, wanted)));
      return row;
    }));
    mark();
    others.replaceChildren(...candidates.flatMap(([x1, y1, x2, y2, score]) => {
      const box = [x1, y1, x2, y2], shares = item.boxes.map((one) => overlap(one, box));
      const alike = shares.findIndex((share) => share >= facts.overlap);
      if (shares.includes(1)) return [];
      return [tableRow(item, alike < 0 ? "candidate" : `candidate, like box ${alike + 1}`, score, box)];
    }));
  }

  function tableRow(item, name, score, box) {
    const share = (100 * area(box)) / (item.size[0] * item.size[1]);
    const row = element("tr", {}, element("th", { scope: "row" }, element("i", { class: "key" }), name));
    const cells = [written(score), box.map((value) => Math.round(value)).join(", "), `${share.toFixed(0)} %`];
    if (item.truth) cells.push(item.truth.reduce((best, one) => Math.max(best, overlap(box, one)), 0).toFixed(2));
    row.append(...["", ...cells].map((text) => element("td", {}, text)));
    return row;
  }

  function decisionButton(item, index, wanted) {
    const label = `${wanted} box ${index + 1}`;
    const button = element("button", { type: "button", value: wanted, "aria-label": label }, `${MARKS[wanted]} ${wanted}`);
    button.addEventListener("click", () => {
      selected = index;
      decide(item, [index], wanted);
    });
    return button;
  }

  function step(by) {
    if (!shown.length) return;
    const place = shown.indexOf(open);
    show(shown[place < 0 ? 0 : (place + by + shown.length) % shown.length]);
  }

  function showFromAddress() {
    const item = byNumber.get(Number(location.hash.slice(1)));
    if (item && item !== open) show(item);
    else if (!item && view.open) view.close();
  }

  // Events

  byId("bar").addEventListener("submit", (event) => event.preventDefault());
  byId("bar").addEventListener("input", arrange);
  byId("reset").addEventListener("click", () => {
    controls.verdict.value = "all";
    controls.clearness.value = "any";
    controls.decision.value = "any";
    controls.find.value = "";
    arrange();
  });
  byId("save").addEventListener("click", save);
  byId("load").addEventListener("click", () => byId("file").click());
  byId("file").addEventListener("change", async ({ target }) => {
    for (const file of target.files) await load(file);
    target.value = "";  // so that the same file can be chosen again
  });
  byId("undo").addEventListener("click", undo);
  byId("forget").addEventListener("click", forget);
  byId("grid").addEventListener("keydown", (event) => {
    const item = event.target.closest("li")?.item;
    if (!item || event.altKey || event.ctrlKey || event.metaKey) return;
    const columns = getComputedStyle(byId("grid")).gridTemplateColumns.split(" ").length;
    const by = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[event.key];
    if (by) cards.get(shown[shown.indexOf(item) + by] ?? item).firstElementChild.focus();
    if (by || decideByKey(event.key, item, item.boxes.map((_, place) => place))) event.preventDefault();
  });
  byId("previous").addEventListener("click", () => step(-1));
  byId("next").addEventListener("click", () => step(1));
  byId("close").addEventListener("click", () => view.close());
  view.addEventListener("click", (event) => {
    const { left, right, top, bottom } = view.getBoundingClientRect(), { clientX: x, clientY: y } = event;
    if (event.target === view && (x < left || x > right || y < top || y > bottom)) view.close();
  });
  view.addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (by) {
      event.preventDefault();
      step(by);
      return;
    }
    const along = { ArrowUp: -1, ArrowDown: 1 }[event.key];
    if (along && open.boxes.length > 1) select(selected + along);
    else if (!decideByKey(event.key, open, [selected])) return;
    event.preventDefault();
  });
  view.addEventListener("close", () => {
    const card = cards.get(open);
    open = opened = null;
    for (const panel of panels) release(panel);
    history.replaceState(null, "", location.pathname + location.search);
    if (card?.isConnected) {
      card.scrollIntoView({ block: "nearest" });
      card.firstElementChild.focus({ preventScroll: true });
    }
  });
  for (const label of document.querySelectorAll(".layers label")) {
    const follow = () => view.classList.toggle(`without-${label.dataset.layer}`, !label.control.checked);
    label.addEventListener("change", follow);
    follow();
  }
  window.addEventListener("hashchange", showFromAddress);

  // Beginning

  document.documentElement.style.setProperty("--first", paint(0));
  for (const item of recall()) update(item);
  tellDecided();
  byId("judged").hidden = !items.some(hasTruth);
  const told = [];
  if (facts.gone) told.push(`${facts.gone} of ${items.length} image files could not be read any more.`);
  if (facts.changed) told.push(`${facts.changed} of ${items.length} image files have changed since the run.`);
  byId("gone").hidden = !told.length;
  byId("gone").textContent = told.join(" ");
  controls.sort.value = facts.sort;
  arrange();
  for (const card of cards.values()) near.observe(card);
  showFromAddress();
})();
