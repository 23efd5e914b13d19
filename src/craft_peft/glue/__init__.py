"""Training and measuring adapters on text classification and regression: GLUE, and tables of the user's own.

The modules need the extra `glue` (`pip install "craft-peft[glue]"`), so that this package imports none of them.

- Data: `tasks` (the nine GLUE tasks), `tables` (files to rows), `data` (rows to data sets), `encoding`, `metrics`
- Models: `methods` (the table of what can be trained, and its recipes), `models`, `heads`
- Runs: `settings` (`TrainingConfig`), `training` (`train`), `optimization`, `runs` (the output folder), `results`,
  `machine`, `summary`
- Report: `report` (tables, pictures and words from result files)
- Use: `inference` (scores and predictions of a trained run), `submission` (the files of GLUE's server), `inspection`
  (a model's stacks)
- Demo: `docstrings` (its text set), `comparison` (its table and page)
"""
