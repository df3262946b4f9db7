"""Questions to a model, on any number of ranks in step: multiple choice, continuations, exact match by generation.

questions       rows of a file -> questions                 prompts        questions -> token ids
likelihood      how likely given texts are                  generation     what the model writes
grading         answers -> right or wrong, and the score    scoring        all of it: one task, one model
saved_models    a model or an adapter -> transformers       harness        tasks of lm-evaluation-harness
offline         `sparse-ds eval`                            score_table    scores as text
"""
