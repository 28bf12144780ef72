"""The task `certified`: certified radii beside an attack, and bounds of whole models."""
