"""The stages of a run, one file each, and the pipeline that runs them."""
