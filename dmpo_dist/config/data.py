"""The ``data`` section of the configuration."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from dmpo_dist.config.section import Section


class Simulator(Section):
    """The built-in world of made-up titles, latent tastes and popularity skew (see ``data/sources/simulator.py``)."""

    users: int = Field(2000, ge=2)
    """Number of simulated users."""
    items: int = Field(400, ge=10)
    """Number of items in the catalogue."""
    events_per_user: int = Field(24, ge=2)
    """Mean number of interactions per user."""
    taste_dim: int = Field(8, ge=1)
    """Number of latent taste dimensions; each is carried by a few words of the titles."""
    popularity_exponent: float = Field(0.8, ge=0)
    """Zipf exponent of item popularity; 0 makes all items equally popular."""
    taste_strength: float = Field(1.5, ge=0)
    """Weight of taste against popularity in a user's choices."""


Kind = Literal[
    "simulator",
    "movielens",
    "amazon",
    "recbole",
    "csv",
    "jsonl",
    "parquet",
    "huggingface",
    "preferences",
    "sdpo",
    "dmpo_released",
]


class Source(Section):
    """Where interactions (or ready preference rows) come from."""

    kind: Kind | None = None
    """None takes what lies at ``path``, or without a path the simulator. Interactions: simulator | movielens | amazon
    (folders in the official layouts) | recbole (a folder of atomic files) | csv | jsonl | parquet | huggingface. Ready
    rows: preferences (TRL's) | sdpo (history, itemList, trueSelection) | dmpo_released (the authors' JSON)."""
    path: Path | None = None
    """File or folder to read (or a hub id for huggingface); the simulator reads none."""
    items_path: Path | None = None
    """File with item, title and optional genres, when the interactions file holds no titles."""
    users_path: Path | None = None
    """File with a row per user, whose fields ``users_columns`` names."""
    separator: Literal["auto", "comma", "semicolon", "tab", "pipe"] = "auto"
    """Between the fields of a CSV file: auto takes the one that its first line has most of."""
    columns: dict[str, str] = Field(default_factory=dict)
    """For recbole, csv, jsonl, parquet and huggingface: our column name -> the file's, for user, item, rating,
    timestamp, title, genres. Without a column rating every interaction is a like. A name of your own, as in
    {description: text}, keeps that text of each item for prompts ({description} in ``template.item``)."""
    items_columns: dict[str, str] = Field(default_factory=dict)
    """The same for ``items_path``, where its columns have other names than the log's: item, title, genres, and names of
    your own."""
    users_columns: dict[str, str] = Field(default_factory=dict)
    """The same for ``users_path``: user, and names of your own, as in {age: age_group}, which ``template.preamble``
    takes."""
    duplicate_titles: Literal["error", "merge"] = "error"
    """What to do when two items share one title: stop, or merge them into one item (the number is printed)."""
    distinguish_by: str | None = None
    """Field of the items, such as author, that is put behind a title that several items share: "Title (author)"."""
    untitled: float = Field(0.05, ge=0, lt=1)
    """Largest share of interactions whose item has no title, to leave out and count; with more of them reading stops.
    """
    articles: Literal["as_is", "first"] = "as_is"
    """For movielens and recbole: first turns "Matrix, The (1999)" into "The Matrix (1999)", as language models do."""
    tolerated_rows: float = Field(0.0, ge=0, lt=1)
    """Largest share of malformed rows to skip and count; with more of them reading stops at the first."""
    category: str | None = None
    """For amazon and dmpo_released: which dataset of the folder, such as Video_Games or rec_Amazon_Game; None takes the
    only one."""
    subset: str | None = None
    """For huggingface: the configuration of the dataset, where it has several."""
    split: str = "train"
    """For huggingface: which of its splits holds the log."""
    released_negatives: int | None = Field(None, ge=1)
    """For dmpo_released: train on the file ..._dpo_ranking_K.json of this K; None takes the largest."""
    prompts: Literal["rebuild", "original"] = "rebuild"
    """For dmpo_released: titles by the template here, all negatives of a history in one group; or the authors' prompts,
    which list two titles, one negative each."""
    simulator: Simulator = Field(default_factory=Simulator)

    @model_validator(mode="after")
    def _articles_of_films(self) -> "Source":
        if self.articles == "first" and self.kind not in (None, "movielens", "recbole"):
            raise ValueError(
                f"articles=first has no effect for kind={self.kind}; leave it out, or set articles=as_is where a "
                "recipe sets it"
            )
        return self

    @model_validator(mode="after")
    def _simulator_reads_no_file(self) -> "Source":
        if self.kind == "simulator" and self.path is not None:
            raise ValueError(
                f"kind=simulator makes users and titles up and reads no file, but path={self.path}; leave kind out to "
                "read that, or leave path out"
            )
        return self

    @model_validator(mode="after")
    def _users_have_fields(self) -> "Source":
        if (self.users_path is None) != (not set(self.users_columns) - {"user"}):
            raise ValueError(
                "users_path and users_columns go together: the file, and the fields to take from it, as in "
                "users_columns={age: age_group}"
            )
        return self


class DataConfig(Section):
    """From interactions to preference groups."""

    path: Path | None = None
    """Folder of the prepared data: ``dmpo data prepare`` writes it, the other commands read it."""
    source: Source = Field(default_factory=Source)
    rating_threshold: float = 4.0
    """A rating at or above this is a like: only likes become positives and history."""
    min_history: int = Field(3, ge=1)
    """A request needs at least this many likes before it."""
    max_history: int = Field(20, ge=1)
    """Keep at most this many of the latest likes as history."""
    k_core: int = Field(1, ge=1)
    """Keep users and items with at least this many interactions each, repeatedly; it looks at the whole log, future and
    all."""
    split: Literal["time", "leave_one_out"] = "time"
    """time: one cut for all users; leave_one_out: each user's last like is for testing and the one before for
    validation, so that training knows events from after the requests (the leak check counts them), and negatives
    are never items the user takes later."""
    validation_quantile: float = Field(0.8, gt=0, lt=1)
    """Requests before this quantile of all timestamps are for training (split=time)."""
    test_quantile: float = Field(0.9, gt=0, lt=1)
    """Requests after this quantile are for testing; those between the two cuts are for validation."""
    repeats: Literal["first", "last", "keep"] = "first"
    """Of several interactions of one user with one item keep the first in time, the last (with split=leave_one_out),
    or all, so that an item of the history may be liked again, as with music and groceries."""
    train_requests_per_user: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Up to this many of a user's latest requests before the cut become training groups; auto takes as many as make
    10,000 groups, or all where there are fewer (the data card says how many)."""
    negatives: Literal["uniform", "dislikes", "popularity", "in_batch"] = "uniform"
    """Training negatives: uniform among unseen items, the user's own low ratings (filled up with uniform), in
    proportion to popularity, or the positives of other training requests, as a random batch holds them (filled up with
    uniform). Hard ones are made of prepared data by ``dmpo data hard-negatives``."""
    popularity_exponent: float = Field(1.0, gt=0)
    """With negatives=popularity: draw in proportion to popularity to this power."""
    levels: Literal["none", "ratings", "repeats"] = "none"
    """What training groups rank: none has one positive against negatives. The others take the user's like and the next
    ones before the cut as well, in levels by rating, or by how often the user takes them again (with repeats=keep);
    the negatives are the last level. Validation and test rank one positive always."""
    level_likes: int = Field(5, ge=2)
    """With levels: rank at most this many likes of a request."""
    score_decay: float = Field(0.5, ge=0)
    """With levels: a like's score, which objective.name=recpo takes its margins from, is its rating (or count) over
    (1 + its place after the request) to this power; 0 leaves times out."""
    unseen_score: float = Field(3.0, gt=0)
    """With levels: the rating of a negative for that, at place level_likes. RecPO's released code takes 3 of 5."""
    negatives_per_group: int = Field(32, ge=1)
    """Negatives stored with each training group; each epoch trains on the next ``train.negatives`` of them."""
    evaluation_negatives: int = Field(19, ge=1)
    """Negatives next to the positive in each validation and test request."""
    evaluation_candidates: Literal["known", "all"] = "known"
    """Items that validation and test requests rank: those somebody took before the request, or, with leave_one_out
    alone, all of the log, as protocols without a clock have it."""
    max_validation_users: int | None = Field(None, ge=1)
    """Keep at most this many validation requests (a seeded sample); None keeps all."""
    max_test_users: int | None = Field(None, ge=1)
    """The same of test requests."""
    stream: bool = False
    """Prepare a log larger than memory: kind=parquet with a folder of shards, which are sorted and split on disk. The
    groups are those of the same log read at once."""
    stream_memory: str = "1GB"
    """Memory for sorting and joining the shards; Python and the share of users at work come on top, about as much."""
    shots: int | None = Field(None, ge=1)
    """Train on this many of the prepared training groups; a smaller number's groups are among a larger one's."""
    shots_seed: int = Field(0, ge=0)
    """Which groups ``shots`` takes: another number draws others. ``seed`` leaves them as they are."""
    shots_skip: int = Field(0, ge=0)
    """Take the ``shots`` after this many of that draw: a preference stage with ``shots_skip=100`` learns from other
    groups than the SFT on ``shots=100`` that it starts from."""

    @model_validator(mode="after")
    def _shots_to_draw(self) -> "DataConfig":
        for key in ("shots_seed", "shots_skip"):
            if getattr(self, key) and self.shots is None:
                raise ValueError(f"{key} has no effect while all groups are used; set data.shots, or leave it out")
        return self

    @model_validator(mode="after")
    def _cuts_in_order(self) -> "DataConfig":
        if self.validation_quantile >= self.test_quantile:
            raise ValueError("validation_quantile must be smaller than test_quantile")
        return self

    @model_validator(mode="after")
    def _last_knows_the_future(self) -> "DataConfig":
        if self.repeats == "last" and self.split == "time":
            raise ValueError(
                "repeats=last would forget what a user took before a request and takes again later, which then comes "
                "up as a negative; set data.repeats=first or keep, or data.split=leave_one_out"
            )
        return self

    @model_validator(mode="after")
    def _stream_is_possible(self) -> "DataConfig":
        if self.stream and self.source.kind not in (None, "parquet"):
            raise ValueError("stream reads Parquet shards; set data.source.kind=parquet")
        if self.stream and self.negatives == "in_batch":
            raise ValueError("in_batch negatives need all requests at once; set data.stream=false or other negatives")
        if not self.stream and self.stream_memory != type(self).model_fields["stream_memory"].default:
            raise ValueError("stream_memory has no effect while the log is read at once; set data.stream=true")
        return self

    @model_validator(mode="after")
    def _all_candidates_need_leave_one_out(self) -> "DataConfig":
        if self.evaluation_candidates == "all" and (self.split != "leave_one_out" or self.stream):
            raise ValueError(
                "evaluation_candidates=all would rank items that nobody had taken yet; set data.split=leave_one_out "
                "and data.stream=false, or data.evaluation_candidates=known"
            )
        return self

    @model_validator(mode="after")
    def _levels_have_what_they_count(self) -> "DataConfig":
        if self.levels == "repeats" and self.repeats != "keep":
            raise ValueError("levels=repeats counts how often a user takes an item again; set data.repeats=keep")
        if self.levels == "none":
            for key in ("level_likes", "score_decay", "unseen_score"):
                if getattr(self, key) != type(self).model_fields[key].default:
                    raise ValueError(f"{key} has no effect with levels=none; set data.levels=ratings or repeats")
        return self

    @model_validator(mode="after")
    def _exponent_needs_popularity(self) -> "DataConfig":
        if self.popularity_exponent != 1.0 and self.negatives != "popularity":
            raise ValueError("popularity_exponent has no effect; set data.negatives=popularity")
        return self
