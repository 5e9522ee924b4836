"""Predictions in the formats of other tools: COCO, VOC, YOLO, CSV, Parquet, Label Studio."""
