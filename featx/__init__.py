"""featx: frozen CNN features, cached once; scikit-learn heads compared, chosen and served.

    images = ImageSet.from_folder("photos")
    extract_features(images, load_backbone("efficientnet_lite0"), "photos.featx")
    features = read_features("photos.featx")
    cross_val_score(make_head("logreg"), features.embeddings, features.labels, cv=KShotSplit(5))

The public names are those of ``__init__.pyi``. They are imported when they are first used, so ``import featx`` costs
nothing and never imports torch.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
