SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help quickstart test lint format clean

ENV := source launch/setup_env.sh; dmpo_setup dev,quant,bench,track,serve

help: ## Show these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

quickstart: ## Set up and run the quickstart (options: make quickstart ARGS="...")
	launch/quickstart.sh $(ARGS)

test: ## Lint, format check, types, all tests (options for pytest: make test ARGS="...")
	launch/test.sh $(ARGS)

lint: ## Lint, format check and types, without the tests
	$(ENV); ruff check; ruff format --check; pyrefly check

format: ## Format the code and apply safe lint fixes
	$(ENV); ruff format; ruff check --fix

clean: ## Remove caches and build leftovers; keeps runs/ and .venv/
	rm -rf build dist ./*.egg-info .pytest_cache .ruff_cache .hypothesis .coverage
	find dmpo_dist deepspeed_configs launch tests -type d -name __pycache__ -prune -exec rm -rf {} +
