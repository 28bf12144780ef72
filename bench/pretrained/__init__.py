"""The task `pretrained`: attention distributions and tightness of bounds on pretrained models of installed packages."""
