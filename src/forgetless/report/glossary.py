"""Every word of the reports in plain language, and which word stands behind which name. docs/glossary.md says more."""

GLOSSARY = {
    # ---- what is learnt
    "task": (
        "task",
        "Rows to learn from (training), to choose by (validation) and to judge by (test), and how answers are scored.",
    ),
    "row": ("row", "One example: a prompt and its answer, a chat, or a plain text."),
    "lesson": ("lesson", "What is trained in one go: a task, or for joint training all of them."),
    "step": ("step", "One move of the optimizer, on one batch of rows."),
    "adapter": (
        "adapter",
        "The two small matrices A and B that LoRA adds to a layer and that are trained instead of it: ΔW = s B A.",
    ),
    "deployed": (
        "deployed",
        "The adapter to use after a task. Where a method has two learners, the one that heads the table.",
    ),
    "stock-peft": ("stock PEFT", "The adapter loads with PeftModel.from_pretrained, without this library."),
    # ---- one number for a cell
    "score": (
        "score",
        "The share of a task's test rows that the model answers rightly, by the task's own headline measure.",
    ),
    "headline": ("headline score", "The first measure of a task; the one in the matrix."),
    "own": ("own labels", "The likeliest of the task's own answers is taken as the model's answer."),
    "union": (
        "union of labels",
        "The likeliest answer among the labels of all tasks of the stream: the model is not told which task it is in.",
    ),
    "exact": ("exact match", "The answer that the model writes, compared word for word after normalisation."),
    "completions": (
        "completions",
        "The likeliest of the row's own choices, as a whole or per character, is taken as the model's answer.",
    ),
    "next-token": ("next token", "The share of a row's answer tokens that the model ranks first; for free text."),
    "answers": (
        "scorers of answers",
        "Rules that judge the answer that the model writes: its last number, its chosen letter, ROUGE-L, SARI, code "
        "similarity, a regular expression, JSON fields, or a function of the user's own.",
    ),
    "labels": (
        "predicted-label counts",
        "How often each label was the answer. One label for nearly every row means collapse: the labels interfere, "
        "which need not be lost knowledge.",
    ),
    # ---- the matrix
    "matrix": (
        "R, the score matrix",
        "One row for each moment of the stream, one column for each task: R[i, j] is the score on task j's test rows "
        "after learning task i.",
    ),
    "just-learnt": (
        "just learnt",
        "The cell of a task in the row of its own training, R[j, j]: what the model could do before it learnt on.",
    ),
    "not-scored": ("not scored", "No number was measured; it is never taken as 0, and what needs it says so."),
    "bounds": (
        "bounds",
        "Rows that a method is read against: below, the untouched base and the majority answer; above, joint training "
        "and one adapter per task; beside it, the naive sequence. They are what was reached, not theorems.",
    ),
    "base": ("untouched base", "The model as it was before any of this training."),
    "majority": (
        "majority answer",
        "What a model scores that always gives the commonest answer of the test rows. A score near it shows no skill.",
    ),
    "sequence": ("naive sequence", "One adapter trained on, task after task: what happens if nothing is done."),
    "per-task": (
        "one adapter per task",
        "Each task has its own adapter, chosen by the task's name at test: nothing can be forgotten.",
    ),
    "joint": ("joint training", "All tasks' rows shuffled together, as if they had never come one after another."),
    # ---- how sure
    "points": ("point", "One percentage point: from 80 % to 75 % is 5 points lost."),
    "change": (
        "lost, gained",
        "The score now minus the score when just learnt, on the same test rows, in points of 100. Lost rows were right "
        "and are now wrong; gained rows were wrong and are now right.",
    ),
    "flips": (
        "flip",
        "A test row that turned from right to wrong, or from wrong to right, since its task was just learnt.",
    ),
    "interval": (
        "95 % interval",
        "The values that the test rows leave plausible. When the interval of a change covers 0, these rows cannot tell "
        "a loss from chance.",
    ),
    "p": (
        "p",
        "How likely so large a change would be by chance. Where rows are right or wrong, the exact McNemar test: each "
        "row that turned was as likely lost as gained. Where rows have shares, a sign-flip test: each row's scores "
        "then and now could be swapped. Not corrected for looking at several tasks.",
    ),
    "seed": (
        "seed",
        "Fixes initial weights, order of rows and draws. One seed says nothing about the spread over seeds.",
    ),
    # ---- summaries of the matrix
    "average": ("average accuracy", "The mean score over tasks at the end; each task counts the same."),
    "weighted": ("sample-weighted accuracy", "The same where each test row counts the same."),
    "incremental": (
        "average incremental accuracy",
        "The mean of what was known after each task, over the tasks seen so far.",
    ),
    "learning": ("learning accuracy", "The mean of the just-learnt scores: how well each task was learnt in its turn."),
    "backward": (
        "backward transfer",
        "The mean change of the earlier tasks from just learnt to now; below 0 means forgetting. Papers divide by "
        "different numbers, so the divisor is named.",
    ),
    "forward": ("forward transfer", "What a task gained over the untouched base before its own turn."),
    "forgetting": (
        "forgetting",
        "As backward transfer with the sign turned, but counted from the best score that a task ever had.",
    ),
    "op": ("OP_t", "Average accuracy after each task over the tasks seen so far, as TRACE reports it."),
    "retention": ("retention", "What share of a task's just-learnt score is left, averaged over earlier tasks."),
    # ---- against the base's own predictions
    "kl": (
        "KL",
        "KL divergence: how much of what the base predicts the model no longer says, Σ p log(p / q) over the words of "
        "the vocabulary, with p the base's probability of the next word and q the model's. In nats per token; 0 where "
        "both say the same. The base's predictions are the measure, so no right answers are needed.",
    ),
    "entropy": ("entropy", "How undecided the base itself is about the next word, -Σ p log p. It is no loss."),
    "cross-entropy": (
        "cross-entropy",
        "Entropy plus KL, -Σ p log q: the loss of scaling laws for forgetting. Only what exceeds the entropy was lost.",
    ),
    "agreement": ("agreement", "The share of tokens at which both models hold the same word likeliest."),
    # ---- what a method does
    "loss": (
        "loss",
        "What training makes small: the mean of -log p(right token) over answer tokens, and what the method adds.",
    ),
    "check": (
        "check",
        "Evidence that the method did on a task what it is for. A method that does nothing is the commonest fault of "
        "published code, so a failing check is a warning.",
    ),
    "penalty": (
        "penalty",
        "What the method adds to the loss to protect earlier tasks. It is drawn on its own scale.",
    ),
    "penalty-share": (
        "penalty share",
        "Size of the penalty's gradient over size of the loss's gradient. Below 0.001 the penalty does nothing.",
    ),
    "gradient-norm": ("gradient norm", "Size of the whole gradient of a step, before it is clipped."),
    "memory": ("memory", "Rows of earlier tasks that are kept and learnt again (replayed)."),
    "overlap": (
        "overlap",
        "O-LoRA: how much the new adapter reads its inputs in directions that earlier adapters read; 0 is none.",
    ),
    "density": (
        "density",
        "The share of the entries of an update that are not 0: exactly, above 1e-6, or above 1e-3 of the layer's "
        "largest. Sparse updates of two tasks rarely change the same weight.",
    ),
    "learners": (
        "fast learner, slow learner",
        "I-LoRA: the adapter that is trained, and the one that follows it as a moving average. Their distance is the "
        "size of the difference of their weights.",
    ),
    "consistency": ("consistency", "I-LoRA: how far apart the two learners' answers to replayed rows are."),
}
"""Anchor -> term, explanation."""

OF_METRIC = {
    "average_accuracy": "average",
    "weighted_accuracy": "weighted",
    "average_incremental": "incremental",
    "learning_accuracy": "learning",
    "bwt": "backward",
    "bwt_over_all": "backward",
    "fwt": "forward",
    "forgetting": "forgetting",
    "retention": "retention",
    "running_average": "op",
}

OF_FIGURE = {
    "adapter": "adapter",
    "loss": "loss",
    "gradient_norm": "gradient-norm",
    "penalty": "penalty",
    "penalty share": "penalty-share",
    "penalty_share": "penalty-share",
    "||BA||_1": "penalty",
    "replayed rows": "memory",
    "kept rows": "memory",
    "overlap": "overlap",
    "density exact": "density",
    "density absolute": "density",
    "density relative": "density",
    "slow learner moved": "learners",
    "slow-fast distance": "learners",
    "slow_fast_distance": "learners",
    "consistency": "consistency",
}
"""A check's or a logged figure's name -> anchor; a method's new figure has none until it is added here."""

OF_MEASURE = {
    "likelihood": "own",
    "likelihood_union": "union",
    "exact_match": "exact",
    "completion_per_char": "completions",
    "completion": "completions",
    "next_token": "next-token",
    **dict.fromkeys(
        ("number", "choice", "rouge_l", "sari", "code_similarity", "regex", "json_fields", "json_valid"), "answers"
    ),
}

_SHARED = (
    "task", "row", "score", "headline", "not-scored", "points", "interval", *dict.fromkeys(OF_METRIC.values())
)  # fmt: skip

AUDIT_GLOSSARY = {
    # ---- the verdict
    "reference": (
        "reference",
        "The earlier model, or an earlier release, that every model is compared with on the same rows and tokens.",
    ),
    "verdict": (
        "verdict",
        "Pass: every budgeted loss is shown to be within its budget. Regression: one is shown to be over it. "
        "Insufficient evidence: these rows show neither. Without a budget there is none.",
    ),
    "budget": (
        "budget",
        "The most that may be lost: points of a mean score on a task or probe, or nats per token of KL on a text.",
    ),
    "bound": (
        "bound",
        "How small and how large the loss may be, as far as these rows tell, each with the stated confidence. More "
        "rows bring the two together.",
    ),
    "claim": (
        "claim of a loss",
        "Made only where the lower bound is above the budget, or above 0 without one. Many tasks mean many chances of "
        "a false alarm, so the bounds are adjusted for their number (Holm).",
    ),
    "lost": ("loss", "The reference's mean score minus the model's on the same rows; below 0 is a gain."),
    # ---- rows and answers
    "turned": ("row that turned", "A row whose score is lower (worse) or higher (better) than the reference's."),
    "same-answer": (
        "same answer",
        "The share of rows with the reference's answer, right or wrong. It can fall while the score stays.",
    ),
    "probe": ("probe", "Rows that ask what a model should still know or still do, beside the user's own tasks."),
    "refusals": ("refusal", "An answer that declines what was asked."),
    "over-refusals": (
        "over-refusal",
        "A refusal of a harmless prompt that only looks like a harmful one.",
    ),
    "judge": (
        "judge",
        "What decides whether an answer refuses: typical phrases (patterns), or where the reference finds the answer's "
        "opening likelier, after turns that were refused or after turns that were helped (likelihood), or a function "
        "of the user's own.",
    ),
    "sanity": (
        "sanity",
        "Problems that can be seen without knowing the right answer: empty, unfinished (ran into the limit), repeated, "
        "broken characters, in another script than the prompt.",
    ),
    # ---- predictions
    "kl": (
        "KL divergence",
        "How far the model's distribution over the next word is from the reference's, in nats (1 nat = 1.44 bits) a "
        "token; 0 where they are equal. What was forgotten, whatever the right answer.",
    ),
    "cross-entropy": (
        "cross-entropy",
        "The forgetting loss: how surprised the model is by the reference's predictions. Entropy plus KL.",
    ),
    "entropy": (
        "entropy",
        "How unsure the reference is of the next word; the floor of the cross-entropy, which is not 0.",
    ),
    "agreement": ("same word", "How often both hold the same next word likeliest."),
    "noise": (
        "rounding noise",
        "The KL of the reference against itself in another precision and other batches. Less than this is nothing.",
    ),
    "domain": ("domain", "What a document is about, or where it comes from."),
    "token-type": ("kind of token", "What the predicted token is: a word, a part of one, a number, a sign, ..."),
    "place": ("place", "How far into its document a token stands."),
    "certainty": (
        "certainty",
        "How sure the reference is of the next word, by the entropy of its prediction in nats: the lower, the surer.",
    ),
    "document": ("document", "One text, or one row's answer."),
    # ---- weights
    "norm": (
        "norm of the update",
        "The root of the sum of squares of all that changed (Frobenius); relative: divided by the layer's own.",
    ),
    "nuclear-norm": ("nuclear norm", "The sum of the update's singular values."),
    "effective-rank": (
        "effective rank",
        "How many directions the update uses, counted by their size: exp of the entropy of its singular values.",
    ),
    "intruders": (
        "intruder dimension",
        "A leading direction of the changed layer that resembles none of the layer before.",
    ),
    # ---- lost or hidden
    "recovery": (
        "recovery",
        "A copy of the model is trained for a few steps on a few old rows, and thrown away: what comes back at once "
        "was not lost but hidden.",
    ),
    "control": ("healthy control", "The reference, given the same steps on the same rows: what the steps alone do."),
    "remedy": (
        "remedy",
        "A model near this one that lost less: a blend with the reference, its adapter scaled down, a repair on old "
        "rows, or both models kept apart. Its gains and costs are measured on the rows of the audit.",
    ),
} | {anchor: GLOSSARY[anchor] for anchor in _SHARED}
"""The same for the page of an audit."""

INTERPOLATE_GLOSSARY = {
    "line": (
        "straight line",
        "Points (1 - λ) A + λ B between two models: λ = 0 is the first, λ = 1 the second.",
    ),
    "product": (
        "in the product",
        "The points lie between what the adapters add to the weights, s B A; of models without adapters between the "
        "weights.",
    ),
    "factors": (
        "in the factors",
        "The points lie between the matrices A and between the matrices B. Their product has mixed terms, so this is "
        "another path between the same ends.",
    ),
    "curve": (
        "curve",
        "A quadratic Bézier curve between the two models; its middle point is trained so that the loss on it is low.",
    ),
    "plane": (
        "plane",
        "All weighted sums of three models whose weights add up to 1; its axes are in the unit of the weights.",
    ),
    "barrier": (
        "barrier",
        "How far the loss on the path rises above the straight line between the losses of its ends, where it rises "
        "most.",
    ),
    "peak": (
        "peak inside",
        "A point between the ends with a higher mean score than both of them.",
    ),
    "band": (
        "simultaneous interval",
        "It holds for all points of a path together, so that the best or worst of them may be picked on these rows.",
    ),
    "answer-loss": (
        "loss on answers",
        "-log p in nats per answer token, the mean over a task's answer tokens, then over tasks.",
    ),
    "distance": (
        "weight distance",
        "The root of the sum of squared differences of all weights; relative: divided by the first model's own.",
    ),
    "cka": (
        "linear CKA",
        "How alike two models' representations of the same tokens are: 1 where they are equal up to rotation and "
        "scale, near 0 where they have nothing in common.",
    ),
} | {anchor: GLOSSARY[anchor] for anchor in ("task", "row", "score", "points")}
"""The same for the page of an interpolation."""
OVERLAP_GLOSSARY = {
    "adapter": GLOSSARY["adapter"],
    "threshold": (
        "threshold",
        "From which size on an entry of an update counts: a multiple of the usual (root mean square) entry of that "
        "update in that layer. At 0 every entry that is not exactly 0 counts.",
    ),
    "update-density": ("density of an update", "The share of its entries that exceed the threshold."),
    "collision-rate": (
        "collision rate",
        "The share of all entries of the weights that both adapters change by more than the threshold.",
    ),
    "by-chance": (
        "by chance",
        "What updates without any relation would show: for collisions the product of the two densities, for "
        "directions the share that as many random ones have in common.",
    ),
    "inner-product": (
        "inner product, cosine",
        "The sum of the products of equal entries; as a cosine divided by both norms. 1: the same update up to its "
        "size; 0: neither helps nor undoes the other, entry by entry; below 0: one partly undoes the other.",
    ),
    "output-side": (
        "output side",
        "The norm of ΔW_iᵀ ΔW_j: how far both write into the same directions of the layer's output. Relative: divided "
        "by both norms; 0 is not at all, 1 is all in one shared direction.",
    ),
    "input-side": (
        "input side",
        "The norm of ΔW_i ΔW_jᵀ: how far both read from the same directions of the layer's input. O-LoRA's penalty "
        "makes this side small, by A_i A_jᵀ, and leaves the output side free.",
    ),
    "shared-directions": (
        "shared directions",
        "The share of the directions of the smaller update that lie in those of the other, whatever their sizes: the "
        "mean squared cosine of the principal angles.",
    ),
    "principal-angles": (
        "principal angles",
        "The angles between the two sets of directions, the smallest first: 0 is a direction that both have.",
    ),
    "generalised-sparsity": (
        "generalised sparsity",
        "Sum of sizes over root of the number of entries times norm: 1 where all entries have one size, near 0 where "
        "a few hold everything.",
    ),
    "norm": (
        "norm of the update",
        "The root of the sum of squares of all that an adapter changes (Frobenius).",
    ),
    "nuclear-norm": AUDIT_GLOSSARY["nuclear-norm"],
    "effective-rank": AUDIT_GLOSSARY["effective-rank"],
}
"""The same for the page of overlaps."""
BLEND_GLOSSARY = {
    "blend": (
        "blend",
        "A model between the one before and the one after: of each weight the share alpha of the way. Adapters are "
        "mixed as what they add to the base, not factor by factor.",
    ),
    "held-out": (
        "held-out rows",
        "Rows that neither model learnt from, drawn from what the budget is about. Rows that were trained on "
        "show too little loss.",
    ),
    "certified": (
        "certified",
        "Shown by the held-out rows to be within every budget, as every point before it is. With the stated confidence "
        "no certified point is over a budget.",
    ),
    "rows-lost": (
        "rows lost",
        "The share of rows that score less than before (right before, wrong after), whatever was gained on other rows.",
    ),
} | {anchor: AUDIT_GLOSSARY[anchor] for anchor in ("budget", "bound")}
"""The same for the page of a blend."""
COMPARE_GLOSSARY = {
    "configuration": (
        "configuration",
        "A method with all that decides a run. Its runs differ in seed and order of tasks only, and in what a sweep "
        "chose for each order.",
    ),
    "varies": (
        "what varies",
        "What an interval is taken over: seeds, orders of tasks, or for a single run its test rows. Runs of one seed "
        "or one order err together, which it counts. It says nothing of what was held fixed.",
    ),
    "paired": (
        "paired difference",
        "Two methods are compared on runs with the same seed and order, or on the same test rows, so that what is "
        "common to both cancels out.",
    ),
    "holm": (
        "Holm's correction",
        "With many tests some p values are small by chance. Each is raised by how many tests there are, the smallest "
        "most, so that with 95 % certainty no claim of the page is false.",
    ),
    "front": (
        "Pareto front",
        "The configurations that no other one beats both in what was learnt and in what was kept.",
    ),
} | {anchor: GLOSSARY[anchor] for anchor in ("bounds", "base", "majority", "learning", "backward", "stock-peft")}
"""The same for the page of a comparison."""
