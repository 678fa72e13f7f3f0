"""The training loop.

Open `loop` first: `fit`. It takes `step`s at the rates of `optim`, saves its `state`, detects
`collapse`, and shares its work with other processes through `distributed`.
"""
