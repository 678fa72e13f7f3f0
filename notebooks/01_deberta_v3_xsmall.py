# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 01 · DeBERTa-v3-xsmall: which of two answers do people prefer?
#
# *If this page comes from `make demo`:* it ran on the 770 rows that come with the library and scores 154 of them, with
# MiniLM, a small encoder, in the place of DeBERTa-v3-xsmall. It shows that every step works, what the baselines reach
# on so few rows, and how a result is read. It cannot show what an encoder reaches on the competition's 57,477 rows:
# with 154 rows a log loss is known to about ±0.04. The text describes DeBERTa-v3-xsmall; the outputs are those of
# MiniLM.
#
# A prompt, two answers, one vote: we call this a **row**. We predict the probabilities P(A wins), P(B wins) and P(tie),
# and are scored by log loss. A **Siamese** network does this. A **side** of a row is the prompt with one of the
# answers: side 0 has answer A, side 1 has answer B. One encoder reads both sides with the same weights, and a small
# head compares the two embeddings.
#
# The network does not start from zero. A **baseline** is fitted first, on the CPU: the geometric mean of a linear model
# of words and structure features (lengths, lists, code and the like) and of boosted trees of structure features. The
# network learns to correct its predictions.
#
# This notebook uses **DeBERTa-v3-xsmall** (He et al. 2021, <https://arxiv.org/abs/2111.09543>): 12 layers of width 384,
# with 21 million parameters in the layers and another 49 million in the embeddings of its 128,000 tokens. It is the
# smallest of the three backbones; its model card gives 88.1 % on MNLI, where RoBERTa-base, with four times the
# parameters in its layers, has 87.6 %. Notebooks 02 and 03 do the same with RoBERTa-base and ELECTRA-large: the code
# cells are equal, and only the text and the backbone differ.

# %% [markdown]
# ## 1. Parameters
#
# The next cell has the settings that are changed most often. Papermill replaces their values by name (`papermill
# this.ipynb out.ipynb -p num_epochs 1 -p train sample -p test sample`). A name that is no setting stops the run, and
# the error names the nearest right one. The cell must contain literals only: a value that is computed in it would be
# computed before papermill's values are set. All settings are in `prefcls_lib/config.py`.

# %% tags=["parameters"]
backbone = "microsoft/deberta-v3-xsmall"  # hub name, folder, or attached Kaggle input
train = "competition"  # a CSV, "sample" (770 shipped rows), or the attached competition
test = "competition"
out = "auto"  # /kaggle/working on Kaggle, else runs/<backbone>
max_train_rows = 0  # 0: all
num_folds = 10
folds = [0]  # validate on fold 0 of 10: a 90/10 split
seed = 42
max_length = 512
head = "symmetric"  # "concat" is the original study's
num_epochs = None  # None: the backbone's recipe
learning_rate = None
batch_size = 32
time_budget_hours = None  # the whole run ends within it; 11.5 suits Kaggle's 12 hours
resume_from = None  # the attached output of an earlier session that was cut off

# %% [markdown]
# ## 2. The library
#
# On Kaggle, `prefcls_lib` comes with an attached data set; elsewhere `make install` has installed it. The notebook
# defines no function of its own: it calls the library, shows what comes back, and prints the library's source where the
# source is the best explanation. The table shows whether this machine can do the job, and which versions it has. The
# versions are also written into `result.json`, because a score cannot be reproduced without them.

# %%
import importlib.util
import os
import sys
from pathlib import Path

_root = Path(os.environ.get("PREFCLS_INPUT_ROOT", "/kaggle/input"))
_places = [f"{mount}prefcls*/{deeper}" for mount in ("datasets/*/", "") for deeper in ("", "*/", "*/*/")]
_tried = [place + name for name in ("prefcls_lib/__init__.py", "*.whl") for place in _places]
_found = [path for pattern in _tried for path in sorted(_root.glob(pattern))]
sys.path[:0] = [str(path if path.suffix == ".whl" else path.parents[1]) for path in _found]
if importlib.util.find_spec("prefcls_lib") is None:
    raise ModuleNotFoundError(f"attach the data set prefcls-lib. Tried in {_root}: {', '.join(_tried)}")

# %%
# %matplotlib inline
import inspect
import warnings

from prefcls_lib.config import RunConfig

config = RunConfig.from_namespace(globals())

# %%
warnings.filterwarnings("ignore", message="IProgress not found")  # plain progress bars are enough here
import numpy as np
import pandas as pd
from IPython.display import display

import prefcls_lib
from prefcls_lib.data import batching, loading, schema, submission, tokenization
from prefcls_lib.doctor import checks
from prefcls_lib.evaluation import plots, scores, slices
from prefcls_lib.models import network
from prefcls_lib.pipeline import folder, results, steps

checks.first_look(config)

# %% [markdown]
# ## 3. Check the inputs, write a first submission
#
# `steps.start` reads both CSV files, plans the folds, finds the backbone and checks its tokenizer, so that a wrong
# input stops the run before time is spent. It prints a rough estimate of how long the run will take on this machine.
# Then it writes a valid submission with the class shares into the run folder. The baseline's predictions replace it
# later, and the network's at the end, so a submission exists even if the session is cut off. The table shows the
# settings that were set for this run, then those that the backbone's recipe fills in, then the defaults. A **recipe**
# is the library's training settings for a type of backbone (`prefcls_lib/models/recipes.py`).

# %%
job = steps.start(config)
results.settings_table(config, job.config)

# %% [markdown]
# ## 4. The rows
#
# A cell of the CSV is a JSON list with one text for each turn, written in ASCII with `\uXXXX` escapes. So the order of
# the steps matters: the original study (<https://github.com/mhmodir/llm-preference-classification>) removed non-ASCII
# characters, and on the raw cell that removes nothing. Here the cell is parsed first, and no character is removed.
# `null` stands for an answer that is missing; it becomes the empty text, and a structure feature marks it.
#
# Below the tables and the figure, one comparison is printed in full. Read a few before you train: which answer would
# you choose, and how sure are you? People often disagree about such pairs (the report measures how often, on other
# prompts). This is one reason why the log loss of the best solutions of the earlier competition on this data is still
# about 0.97 (private leaderboard of “LMSYS - Chatbot Arena Human Preference Predictions”, Kaggle 2024).

# %%
display(loading.describe_rows(job.rows), job.rows.drop(columns=["group", "source"]).head(3))
plots.plot_rows(job.rows)

# %%
print(loading.format_row(job.rows.iloc[0]))

# %% [markdown]
# ## 5. Folds
#
# A **fold** is a part of the training rows. A model is validated on one fold and trained on all others. Several rows
# can share a prompt: compare “rows” and “different prompts” in the table above. If one of them were used for training
# and the other for validation, the validation score would be too good. So the folds are grouped by prompt and
# stratified by label. They depend on the content of the rows and on the seed, not on the order of the rows. All models
# here, the baselines too, use the same folds. The table counts the rows of each fold by their votes.

# %%
pd.crosstab(job.rows["fold"], job.rows["label"].map(dict(enumerate(["A wins", "B wins", "tie"]))))

# %% [markdown]
# ## 6. The baselines, and where the network starts
#
# Models that need no GPU are fitted on the training folds and scored on the validation rows that the network is scored
# on: the class shares (`prior`), a table by which answer is longer and by how much (`length_bins`), a linear model of
# words and structure features (`structure_tfidf`; structure features are lengths, lists, code, refusals and the like,
# see `data/features.py`), boosted trees of structure features (`structure_boosting`), and the geometric mean of the
# last two (`structure_ensemble`). Such models are strong here: others report a log loss of 1.036 for a linear model of
# words, and the networks of the original study have 1.037 to 1.097, on other splits (`report/published.json`). `low`
# and `high` are the limits of a 95 % interval, from a bootstrap over prompts.
#
# The network starts from `structure_ensemble`, unless `start_from` names another baseline. With the baseline's
# probabilities p, the log-odds
#
# m = (log p_A − log p_B) / 2 and t = log p_tie − (log p_A + log p_B) / 2
#
# are added to the network's logits as a fixed **offset** (m, −m, t). A baseline fits its own training rows better than
# new ones, and the network must not learn to rely on that. Therefore the training rows are cut into five inner folds,
# and a model of each kind is fitted without each of them. A training row gets its offset from the models that were
# fitted without its prompt; validation and test rows get the mean offset of all of them.
#
# The cell prints a line for each fitted model. The **strength** says how closely a model may fit its training rows: C
# of the linear model, and the number of boosting steps of the trees. Where the number of rows allows several strengths,
# they are compared in the inner folds, and a line names the best. All baselines of a fold are fitted together, and
# `seconds` is the time of all.

# %%
results.baseline_table(steps.fit_baselines(job)).round(3)

# %% [markdown]
# ## 7. Tokens
#
# DeBERTa-v3 splits text with **SentencePiece**: a Unigram model with 128,000 pieces, in which `▁` marks the start of a
# word. With the large vocabulary the sides are shorter than with RoBERTa's and ELECTRA's tokenizers: on the 770 shipped
# rows, 348 tokens on average before they are cut, where these have 383 and 366. Three things to know:
#
# - The tokenizer replaces every line break by a space, although lists and code depend on line breaks. We write `¶` for
#   them, a piece of the vocabulary.
# - Its special tokens `[CLS]` and `[SEP]` are ordinary pieces too. If a user types `[SEP]`, the tokenizer returns the
#   real separator, and the usual option against this (`split_special_tokens`) has no effect. The library splits such
#   text.
# - Loaded from `spm.model` in transformers 5.0 to 5.3, the tokenizer leaves out `[CLS]` and `[SEP]` without a warning.
#   The library checks them at every load.
#
# A side has at most `max_length` tokens. The function below decides what is kept of one that is too long: the last
# turns first, the head and the tail of a long text, and at most a quarter of a turn's tokens for the prompt while the
# answer needs the rest. A mark, `…` where the vocabulary has it, shows where a text was cut. `steps.prepare` tokenises
# all rows; then one row is printed as token ids and as text.

# %%
print(inspect.getsource(tokenization.SideTokenizer.lay_out))

# %%
job = steps.prepare(job)
examples = job.examples
for side in (0, 1):
    ids = examples.token_ids[examples.sides[0, side]]
    print(f"side {side}: {len(ids)} tokens\n  ids   {ids[:12].tolist()} ...")
    print(f"  text  {job.backbone.tokenizer.decode(ids)[:700]}\n")
print("tokens of a side:", pd.Series(examples.lengths.ravel()).quantile([0.5, 0.95]).round().to_dict())
print(f"rows that are cut: {examples.cut.any(axis=1).mean():.1%}")
print(f"tokens of a side that are seen: {(examples.lengths / examples.full_lengths).mean():.1%}")
plots.plot_token_lengths(examples.lengths, job.config.max_length)

# %% [markdown]
# ## 8. Batches
#
# DeBERTa's attention computes three products for each pair of positions (content to content, content to position,
# position to content; see below), so padding costs more than with the other backbones. A step is one update of the
# weights, from `batch_size` rows; a row's two sides are called a **pair**. The memory for the backward pass grows with
# the tokens. So a step is cut into **micro-batches** of whole pairs, each with at most `max_tokens_per_micro_step`
# tokens; their gradients add up to that of the whole step. In a micro-batch, the sides are sorted by length and pass
# through the encoder in **padded batches** of nearly equal length. If 16 random pairs of the shipped rows were padded
# to the longest side instead, 52 % of the computed tokens would be real ones. The cell shows the batches of a CPU; on a
# GPU lengths are rounded up to multiples of 8, and a batch may have more padding.

# %%
from prefcls_lib.pipeline.folds import new_model, split_rows
from prefcls_lib.training.loop import StepPlan

training, valid, *_ = split_rows(job, job.config.folds[0])
epoch, step = StepPlan(training, job.config).batch(0)
micro_batch, *others = batching.split_batch(step, epoch.lengths, job.config.max_tokens_per_micro_step)
token_ids = [epoch.token_ids[side] for side in np.unique(epoch.sides[micro_batch])]
print(f"{len(step)} pairs in {1 + len(others)} micro-batches; the padded batches of the first one:")
for taken, length in batching.plan_padded_batches(token_ids):
    real = sum(len(token_ids[side]) for side in taken) / (len(taken) * length)
    print(f"{len(taken):3} sides, padded to {length:3} tokens: {real:.0%} of them real")

# %% [markdown]
# ## 9. The network
#
# In standard attention, a token's position is added to its embedding once, before the first layer. DeBERTa keeps
# content and position apart (**disentangled attention**, He et al. 2020, <https://arxiv.org/abs/2006.03654>): each head
# adds content-to-content, content-to-position and position-to-content terms, where position means the relative
# distance; in the released v3 models, far distances share buckets. The encoder has no absolute positions, so it takes
# more than 512 tokens.
#
# It was pretrained with **replaced-token detection**, like ELECTRA: decide for every token whether a smaller generator
# replaced it. Every position gives a training signal, not only the 15 % that are masked. Generator and discriminator
# share their embeddings, but the discriminator's gradient does not reach the shared part; it trains a difference of its
# own (gradient-disentangled embedding sharing, He et al. 2021).
#
# The embedding of a side, **u** for A and **v** for B, is the mean of the encoder's last hidden states over the real
# tokens. The head reads nothing else: after a normalisation (LayerNorm) it gets u, v, u − v and u ∗ v, and has one
# hidden layer with two outputs. The **correction** is added to the baseline's offset: this sum gives the logits of the
# prediction. The **auxiliary output** is trained to predict without the offset; the two losses are added, and no
# prediction of the model uses it. Without it, rows that the baseline already explains would give the encoder little
# gradient. (`skip` in the code below is for a start from a reward model, `init_from`.)
#
# Both orders of the answers are computed and averaged, with A and B swapped back, so that swapping the answers swaps
# the probabilities exactly. With one order alone this does not hold: a cross-encoder (both answers in one sequence)
# changed its prediction of the winner on 31 % of the shipped rows when the answers changed places (`report/log.md`).
#
# The last layer of the correction starts at zero. So the untrained network predicts what the baseline predicts, and the
# log loss below is the baseline's on these rows. (With `start_from = "none"` there is no offset, the auxiliary output
# is the prediction, and it starts at the class shares.) The number shows at once whether data, labels, baseline and
# head fit together.

# %%
source = inspect.getsource(network.PreferenceHead.forward) + inspect.getsource(network.PreferenceHead._one_order)
print(source)

# %%
from prefcls_lib.models.predict import predict_proba
from prefcls_lib.runtime.devices import make_accelerator

accelerator, few = make_accelerator(job.config.mixed_precision), valid.take(slice(64))
untrained = new_model(job, training, accelerator)
probs, _ = predict_proba(untrained, few, accelerator)
del untrained  # the GPU is needed for training
print(f"untrained model, log loss on {len(few)} validation rows: {scores.log_loss(few.labels, probs):.3f}")

# %% [markdown]
# ## 10. Training
#
# The recipe of this backbone: learning rates of 4e-5 for the encoder and 5e-4 for the head, 3 epochs, warm-up over the
# first tenth of the steps. Expect **a slow start**: DeBERTa-v3 may need about 10,000 rows before its loss falls (an
# assumption, we have not measured it). Do not stop a run because its loss stays at the baseline's at first.
#
# The weights stay in fp32, and matrix products are computed in half precision where the device is fast at it (bf16 or
# fp16). In fp16 a gradient can overflow; such a step is left out and counted (`skipped_steps` in `history.csv`).
#
# A model is trained for each fold and seed. The first line says where it starts: `starts at step 0`, or `resumed at
# step N` at the last checkpoint of a session that was cut off. A model that is finished is saved, and is not trained
# again if you run this notebook on the same folder. With `time_budget_hours`, training ends after fewer steps if
# necessary, and a validation for which there is no time is left out.
#
# Each validation prints a line: the training loss since the last validation, and log loss and accuracy on the
# validation rows. It also scores the auxiliary output, the encoder's own predictions: what the encoder knows without
# the baseline. If these are nearly the same for all rows, or if they are no better than the class shares and the
# network is no better than its baseline, a line says that the encoder does not contribute yet. (In the demo it says so
# at both validations: 616 training rows are too few.) After the warm-up and 10,000 more rows such an encoder counts as
# **collapsed**. If this is so at two validations in a row, the training of this model ends early, and the result says
# what to set.

# %%
steps.fit_folds(job)

# %% [markdown]
# ## 11. The course of training
#
# The trained models have also predicted the test rows. `steps.finish` averages these predictions, replaces the
# submission, and checks the new one. With at least 2,000 validation rows the weights of the best validation are kept,
# with fewer those of the last step, since the best one would be a matter of chance. All lines of the plot are
# unsmoothed log loss: label smoothing, where a preset uses it, is in the training loss only, and in no number that is
# shown here.

# %%
result = steps.finish(job)
history = folder.read_table(job.folder / "history.csv")
plots.plot_history(history, result["baseline_log_loss"])

# %% [markdown]
# ## 12. The result, beside the baselines
#
# What does the encoder add? The network is compared with the baseline that it started from (with `start_from = "none"`,
# with `structure_ensemble`), on the same rows. The verdict is BEATS or LOSES only if the whole 95 % interval of the
# difference lies on one side of zero (p at most .05), else INCONCLUSIVE: the interval says which differences are still
# possible. With few validation rows most verdicts are INCONCLUSIVE; the sentence ends with the size that a difference
# needs to be found in 80 % of samples like this one. A part of a difference can be better calibration, which needs no
# encoder: compare `calibrated_log_loss` below with that of a run of `prefcls ladder`, which fits the baseline alone.
# The last line is what to try next.

# %%
print(results.verdict(result))
table = results.result_table(result)
display(table.round(3))
plots.plot_results(table)

# %% [markdown]
# ## 13. Calibration
#
# Log loss punishes unjustified confidence. Confidence is the probability of the most probable class, and the expected
# calibration error is the mean distance of the points from the diagonal. Where points lie below it, the model is
# overconfident. A temperature and a tie bias that are fitted on other out-of-sample rows can correct that:
# `calibrated_log_loss` is the result on rows that they were not fitted on. With a few hundred rows it can be worse than
# `log_loss`, and then the probabilities are better left as they are. `prefcls blend` applies this calibration.
# `flip_rate` is the share of rows whose most probable class does not follow when the answers change places: 0 with the
# symmetric head.

# %%
oof = folder.read_table(job.folder / "oof.csv").set_index("id")
rows = job.rows[job.rows["id"].isin(oof.index)]
labels, probs = rows["label"].to_numpy(), oof.loc[rows["id"], list(schema.LABEL_COLUMNS)].to_numpy()
ece = scores.expected_calibration_error(labels, probs)
for name in ("log_loss", "calibrated_log_loss", "flip_rate"):
    print(f"{name:20} {result[name]:.3f}")
plots.plot_reliability(scores.reliability_table(labels, probs), ece)

# %% [markdown]
# ## 14. Slices
#
# The first table counts the votes (lines) by the class that the model holds for the most probable (columns). A tie is
# the rarest vote (31 % in the competition's file), and still less often the most probable class (for the report's
# network, on 23 % of the shipped rows). A slice is a part of the validation rows with a property in common. The second
# table has the log loss of each slice with its number of rows and its 95 % interval; slices with fewer than ten prompts
# get none. Look at count and interval before you believe a difference.

# %%
display(slices.confusion_matrix(labels, probs))
cut = examples.cut[rows.index].any(axis=1)
slices.slice_table(rows, labels, probs, cut=cut).round(3)

# %% [markdown]
# ## 15. The three most confident mistakes
#
# The predictions with the highest probability for a class that did not win. Is the model wrong, or is the vote
# unusual?

# %%
mistakes = slices.most_confident_mistakes(rows, probs, count=3)
display(mistakes.round(2))
for position in mistakes.index:
    print(loading.format_row(rows.iloc[position], max_chars=800), end="\n\n\n")

# %% [markdown]
# ## 16. The submission, read back
#
# Checked: the columns, the ids in the order of `test.csv`, and three probabilities inside (0, 1) with sum 1 in every
# row.

# %%
submission.check_submission(job.folder / "submission.csv", list(job.test_rows["id"])).head()

# %% [markdown]
# ## 17. A pair of your own
#
# The run folder is a model that can be loaded anywhere the library is installed. Change the question and the two
# answers. In the second line the answers have changed places, and so have the first two probabilities.

# %%
question = "Name three planets."
answers = ["Mars, Venus and Saturn.", "Sure! Here are three planets:\n\n1. Mars\n2. Venus\n3. Saturn"]
model = prefcls_lib.load(job.folder)
for first, second in (answers, answers[::-1]):
    print(pd.Series(model.predict_proba([question], [first], [second])[0], model.classes).round(3).to_dict())

# %% [markdown]
# ## What next
#
# - We have not trained this backbone on the competition's rows yet; what we measured, with MiniLM, is in `report/`. The
#   original study reached 1.0458 with this backbone (unsmoothed, from its logs; the 1.0597 that it published includes
#   label smoothing). Others report 1.0338 at 512 tokens (`report/published.json`).
# - More folds: `folds = [0, 1, 2, 3, 4]` trains five models and averages their predictions.
# - A larger backbone: others report 0.997 for DeBERTa-v3-large as a Siamese network with 768 tokens a side. Set
#   `backbone = "microsoft/deberta-v3-large"` and `max_length = 768`, which its relative positions allow. One epoch of
#   it is projected to take 1.3 to 8.4 hours on one T4 (`report/studies/t4_plan.md`).
# - Both answers in one sequence (`architecture = "cross"`), or start from a reward model (`init_from`): see
#   `prefcls_lib/README.md`.
