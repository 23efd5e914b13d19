"""Training and measuring adapters on text classification and regression: GLUE, and tables of the user's own.

The modules need the extra `glue` (`pip install "craft-peft[glue]"`), so that this package imports none of them:

- `tasks`: the nine GLUE tasks as rows of a table
- `tables`, `data`: files to data sets, with errors that name file and line
- `metrics`: the official metrics
- `methods`: the table of methods that the runner can train
- `models`: base models, and trained runs read back
- `heads`: where the classification head starts
- `training`: `TrainingConfig` and `train`
- `results`: what a run folder keeps
- `inference`: scores and predictions of a trained run
"""
