"""The task `tightness`: how far above the true local Lipschitz constant each bound is."""
