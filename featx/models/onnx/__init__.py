"""Models as ONNX: from a photo, or from embeddings, to answers, for runtimes that know nothing of featx."""
