"""The name under which attention keeps what its backward pass needs."""

# Every implementation gives its output (and the log-sum-exp, where its kernel returns one) this name with
# `checkpoint_name`; the policy of `jax.checkpoint_policies.save_only_these_names(RESIDUALS)` then saves them, and the
# backward pass does not run the forward kernel again.
RESIDUALS = "attention"
