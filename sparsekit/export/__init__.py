"""ONNX files: written, compared with torch, summarised, put into fewer bits."""
