"""What other programs read and write: Hugging Face directories, PEFT adapters, ONNX, model cards."""
