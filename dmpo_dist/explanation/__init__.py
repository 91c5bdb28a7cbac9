"""Why a title has its place for a user: its words, the history items behind it, and whether that attribution holds."""
