"""Why a title is at its rank for a user: its words, the history items behind it, and whether that attribution holds."""
