"""Packed models in the formats of other programs: ONNX, OpenVINO, `torch.export`."""
