"""Targets of export, one file each: `write(source, target, auto_class, dtype, probe) -> facts`."""
