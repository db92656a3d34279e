"""Published corpora, the synthetic demo, and the check of a corpus before a run."""
