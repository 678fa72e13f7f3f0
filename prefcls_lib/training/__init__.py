"""The training loop.

Open `loop` first: `fit`. It takes `step`s at the rates of `optim`, calls `validation` and saves its state in a
`checkpoint`.
"""
