"""One file per sparse method: its `FACTS` (see `config.methods`) and how it chooses (see `selection.registry`)."""
