"""Training and measuring adapters on text classification and regression: GLUE, and tables of the user's own.

The modules need the extra `glue` (`pip install "craft-peft[glue]"`), so that this package imports none of them.

- Data: `tasks` (the nine GLUE tasks), `tables` (files to rows), `data` (rows to data sets), `encoding`, `metrics`
- Methods: `method_table` (what can be trained) of `method_row`s, `methods` (looks them up), `recipes`, `targets`,
  `budgets` (the setting that so many parameters pay for)
- Models: `models`, `heads`
- Runs: `settings` (`TrainingConfig`), `training` (`train`), `optimization`, `checkpoints`, `interruption`, `loggers`
- What a run leaves: `runs` (its folder), `results`, `checking` (is one whole and consistent?), `figures` (of its
  adapter), `machine`, `summary`
- Many runs: `sweep` (from one file, here or on a cluster), `report` (tables, pictures and words from result files)
- Use: `inference` (scores and predictions of a trained run), `submission` (the files of GLUE's server), `inspection`
  (a model's stacks)
- Demo: `docstrings` (its text set), `comparison` (its table and page)
"""
