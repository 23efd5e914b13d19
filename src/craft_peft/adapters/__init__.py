"""The tensor methods, one file a paper: what is added to the weight of layer l. They know `torch`, not PEFT."""
