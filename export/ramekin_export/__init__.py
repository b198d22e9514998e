"""The export stage: a T5 checkpoint becomes two ONNX graphs, without torch."""
