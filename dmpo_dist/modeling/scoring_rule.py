"""What titles are ranked by: their log-probability, and what may be taken off it.

A language model's log-probability of a title is first of all how common the string is. Four rules have names:

``sum``        log p(title | history), over all of its tokens and its end
``mean``       the same per token
``prior``      log p(title | history) - w log p(title | no history)
``reference``  log p(title | history) - log p_reference(title | history)
"""

import numpy as np

from dmpo_dist.data.template import Template
from dmpo_dist.data.tokenization import TokenGroup
from dmpo_dist.errors import UserError


def adjusted(
    log_probs: np.ndarray,
    lengths: np.ndarray,
    reference: np.ndarray | None = None,
    log_popularity: np.ndarray | None = None,
    length_normalize: bool = False,
    popularity_weight: float = 0.0,
    prior: np.ndarray | None = None,
    prior_weight: float = 0.0,
) -> np.ndarray:
    """What titles are ranked by: (log pi - log pi_ref - w log prior) / length - a log popularity; arrays of (R,).

    Args:
        log_probs: summed over each title's tokens.
        lengths: these tokens, the end counted.
        reference: log-probs of another model, to be subtracted.
        log_popularity: on whatever scale; a constant does not change a ranking.
        length_normalize: divide by ``lengths``.
        popularity_weight: the a above.
        prior: log-probs after an empty history.
        prior_weight: the w above.
    """
    scores = log_probs if reference is None else log_probs - reference
    scores = scores if prior is None else scores - prior_weight * prior
    scores = scores / lengths if length_normalize else scores
    return scores if log_popularity is None else scores - popularity_weight * log_popularity


def scored_lengths(group: TokenGroup) -> np.ndarray:
    """(R,) int64, scored tokens of each response."""
    return np.array([len(row) - start for row, start in zip(group.branches, group.scored_from, strict=True)])


def require_prior(template: Template, model: str) -> None:
    """Raise UserError where ``template`` of the model in ``model`` leaves no prompt without a history."""
    if not template.render(()).text:
        raise UserError(
            f"{model}: its template leaves no prompt where there is no history, so that titles have no prior; set "
            "template.preamble or template.request to some text, or leave out ranking.prior_weight and the rule prior"
        )
