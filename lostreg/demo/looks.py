"""How the demo's page looks, and what stands on it from the start."""

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import gradio as gr

from lostreg.images.decode import read_image
from lostreg.images.draw import encoded

TITLE: Final = "Find the main object of a photo"
INTRO: Final = (
    "Drop a photo. A Vision Transformer that stays as it is looks at it patch by patch, and the method that you choose "
    "boxes what is unlike the rest. That needs no labels; what the network learned from is told beside its name. "
    "Photos stay on the computer that runs this page."
)
START: Final = "Drop a photo to begin."
_EXAMPLE_SIDE: Final = 160  # pixels
OBJECTS: Final = "<b>What was found:</b> mask, box and score of each object; the red square is its seed."
TAUGHT: Final = (
    "<b>What other photos taught</b> ({images:,} of them, without labels): how likely each patch is part of an object, "
    "from dark (0 %) to bright (100 %). A candidate ranks higher the brighter it is and the darker what surrounds it."
)
ATTENTION: Final = "<b>Attention:</b> where the backbone itself looks, for comparison: only DINO-seg uses it."

STYLE: Final = """
.gradio-container { max-width: 82rem !important; margin: 0 auto !important; }
#intro h1 { margin: 0 0 0.2rem; font-size: 1.6rem; }
#layout { display: grid; gap: 1rem; grid-template-columns: minmax(17rem, 1fr) minmax(0, 2.6fr);
  grid-template-areas: "photo answer" "options answer"; grid-template-rows: auto 1fr; align-items: start; }
#photo-side { grid-area: photo; } #answer-side { grid-area: answer; } #options-side { grid-area: options; }
#layout > div { min-width: 0 !important; width: 100%; }
.note { border-radius: 0.5rem; padding: 0.65rem 0.9rem; border-left: 0.3rem solid #8a8f98; line-height: 1.45;
  background: color-mix(in srgb, #8a8f98 12%, transparent); overflow-wrap: anywhere; }
.note.clear { border-color: #16a06a; background: color-mix(in srgb, #16a06a 13%, transparent); }
.note.unclear { border-color: #d99100; background: color-mix(in srgb, #d99100 15%, transparent); }
.note.problem { border-color: #c8372d; background: color-mix(in srgb, #c8372d 13%, transparent); }
#layout .html-container, #intro { padding: 0 !important; }
table.boxes { width: 100%; border-collapse: collapse; border: 0 !important; margin: 0;
  font-variant-numeric: tabular-nums; }
table.boxes th, table.boxes td { text-align: right; padding: 0.3rem 0.7rem 0.3rem 0 !important; border: 0 !important;
  border-bottom: 1px solid var(--border-color-primary) !important; }
table.boxes th:first-child, table.boxes td:first-child, table.boxes td:last-child { text-align: left; }
#options-side .block:has(> * input:disabled) { opacity: 0.5; }
#examples { gap: 0.4rem; flex-wrap: wrap; }
#examples button { flex: 1 0 5rem; aspect-ratio: 4 / 3; align-items: flex-end; padding: 0; overflow: hidden;
  background-size: cover; background-position: center; color: #fff; font-size: 0.8rem; font-weight: 500;
  text-shadow: 0 0 3px #000, 0 0 3px #000, 0 0 3px #000; }
.swatch { display: inline-block; width: 0.8em; height: 0.8em; border-radius: 0.2em; margin-right: 0.5em; }
.caption { font-size: 0.86rem; line-height: 1.4; opacity: 0.85; } .panel { gap: 0.5rem !important; }
@media (max-width: 800px) {
  #layout { grid-template-columns: minmax(0, 1fr); grid-template-areas: "photo" "answer" "options";
    grid-template-rows: none; } }
"""
# Gradio does not always show why a file was not taken.
SCRIPT: Final = """<script>
(() => {
  const ask = window.fetch;
  const tell = (text) => {
    const note = document.querySelector("#told .note");
    if (note) { note.className = "note problem"; note.textContent = text; }
  };
  window.fetch = async (...request) => {
    const sends = new URL(request[0].url ?? request[0], location.href).pathname.endsWith("/gradio_api/upload");
    try {
      const answer = await ask(...request);
      if (sends && !answer.ok) tell("That file was not taken. " + await answer.clone().text());
      return answer;
    } catch (error) {
      if (sends) tell("That file could not be sent; it may be too large.");
      throw error;
    }
  };
})();
</script>"""


def example_style(examples: Sequence[Path]) -> str:
    """The style of the buttons of example photos: each shows its photo, small, and asks for no other file."""
    rules = []
    for number, path in enumerate(examples):
        picture = base64.b64encode(encoded(read_image(path, max_side=_EXAMPLE_SIDE).pixels, ".jpg")).decode("ascii")
        rules.append(f'#example-{number} {{ background-image: url("data:image/jpeg;base64,{picture}"); }}\n')
    return "".join(rules)


def theme() -> Any:
    """Gradio's own looks in the system's letters: nothing is fetched from anywhere."""
    return gr.themes.Default(
        primary_hue="teal",
        neutral_hue="slate",
        font=[gr.themes.Font(name) for name in ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")],
        font_mono=[gr.themes.Font(name) for name in ("ui-monospace", "Menlo", "Consolas", "monospace")],
    ).set(block_info_text_color="*neutral_600", block_title_text_color="*neutral_800")


def panel(label: str, name: str) -> gr.Image:
    """A picture that the server draws; its name is its place in the page."""
    return gr.Image(
        label=label,
        show_label=False,
        alt_text=label,
        interactive=False,
        format="jpeg",
        buttons=["fullscreen", "download"],
        elem_id=name,
    )


def caption(text: str) -> str:
    """A few words below a picture, as HTML."""
    return f'<div class="caption">{text}</div>'
