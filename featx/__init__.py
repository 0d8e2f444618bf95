"""featx: frozen CNN features, cached once; scikit-learn heads compared, chosen and served."""
