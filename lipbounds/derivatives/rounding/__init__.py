"""How far computed quantities of attention can be from exact ones."""
