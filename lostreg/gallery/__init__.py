"""One page that shows a run: every image with its boxes, seeds, masks and degrees, to sort and to look through."""
