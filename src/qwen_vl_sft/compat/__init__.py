"""Changes made to libraries at run time: one entry each, with a check that says when it can be removed (`registry.Patch`).

`for_LIBRARY.py` holds the changes and their entries; `packed_batches.py` and `vision_tower.py` those to a model's
forward; `for_trainer.py` the entries of the private Trainer methods that the trainer overrides; `applied_in_other_modules.py`
the entries of changes that another module applies. `catalogue.py` lists all, and `docs/patches.md` is made from it.
"""
