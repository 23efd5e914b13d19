"""The command `craft-peft`: `main`, and one module a command."""
