"""From train.csv to batches of token ids, and from probabilities to submission.csv.

Open `loading` first (CSV to rows), then `splits` (the fold plan), `features`, `tokenization` and `batching`.
`submission` writes and checks the result; `schema` has the column names; `convert` makes extra rows of public files.
"""
