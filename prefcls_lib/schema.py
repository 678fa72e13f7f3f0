"""Column names, label order and the swap of A and B, spelled once."""

ID = "id"
PROMPT = "prompt"
RESPONSES = ("response_a", "response_b")  # in side order: side 0 = A, side 1 = B
TEXT_COLUMNS = (PROMPT, *RESPONSES)
MODEL_COLUMNS = ("model_a", "model_b")
LABEL_COLUMNS = ("winner_model_a", "winner_model_b", "winner_tie")  # label 0, 1, 2
NUM_CLASSES = len(LABEL_COLUMNS)
SWAP = (1, 0, 2)  # the class order after A and B change places
