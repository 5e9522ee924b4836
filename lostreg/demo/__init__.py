"""The demo: a local page where a photo is dropped, and LOST's answer redrawn as its options change."""
