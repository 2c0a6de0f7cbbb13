"""The checkpoint name of the arrays that attention saves for its backward pass."""

# Every implementation marks its output (and the log-sum-exp, if its kernel returns one) with this name through
# `checkpoint_name`. The policy `jax.checkpoint_policies.save_only_these_names(RESIDUALS)` then saves them, and the
# backward pass does not run the forward kernel again.
RESIDUALS = "attention"
