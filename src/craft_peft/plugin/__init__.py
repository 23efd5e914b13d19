"""The only code that knows PEFT: configs, which modules form a stack, the adapted layer, the tuner, registration."""
