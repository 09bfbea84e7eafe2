# The commands of this project; continuous integration calls the same ones. Each sets up what it needs first, which is
# quick when nothing is missing.
#
#   RUN_ARGS, TEST_ARGS and BENCH_ARGS are passed on:  make test TEST_ARGS='--test mirror -- --nocapture'

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup run test model sim mutants chaos check bench

TARGET := $(or $(CARGO_TARGET_DIR),target)

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-7s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## Install what is missing: a C compiler and cmake, Chroma in .venv, Postgres for the tests
	@scripts/setup all

run: ## Start two local Chroma servers, the embedded log and the proxy
	@scripts/setup run
	cargo build --release --locked
	$(TARGET)/release/diptych dev $(RUN_ARGS)

test: ## Run all tests, those on real servers included
	@scripts/setup all
	cargo test --release --locked --quiet -p diptych-model
	cargo run --release --locked --quiet -p diptych-model -- fast
	DIPTYCH_REQUIRE_POSTGRES=1 cargo test --locked --no-fail-fast $(TEST_ARGS)

model: ## Search the model of the protocol: all rules hold, and each is missed when it is off
	cargo run --release --locked --quiet -p diptych-model -- all

sim: ## Simulate SEEDS (1000, or 0..1000) runs of the core under faults and crashes, for at most SECONDS
	SIM_SEEDS=$(or $(SEEDS),1000) $(if $(SECONDS),SIM_SECONDS=$(SECONDS)) \
		cargo test --locked --test sim -- --ignored --nocapture search

mutants: ## Break one rule at a time; does sim find it in SECONDS (600) each? MUTANTS='05 12' for some only
	SECONDS_EACH=$(or $(SECONDS),600) scripts/mutants $(MUTANTS)

chaos: ## Random faults for SECONDS (60), with SEED=, JOURNAL=sqlite|postgres|both, FAULTS=all|kill_node,.., KILLS=
	@scripts/setup all
	CHAOS_SECONDS=$(or $(SECONDS),60) CHAOS_SEED=$(SEED) CHAOS_JOURNAL=$(JOURNAL) \
		CHAOS_FAULTS=$(FAULTS) CHAOS_KILLS=$(KILLS) \
		cargo test --locked --no-fail-fast --test chaos -- --nocapture $(if $(KILLS),,random_faults)

check: ## Formatting, lints, documentation, dependencies
	@scripts/setup build
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --locked --workspace --no-deps
	scripts/check-deps
	git apply --check tests/sim/mutants/*.patch

bench: ## Compare with direct Chroma, nginx, bare Pingora, pgbench: bench/RESULTS.md; PARTS='stub writers', ROUNDS=, SECONDS=
	@scripts/setup bench
	$(if $(WITHOUT_INTENTS),scripts/build-without-intents)
	cargo bench --locked --bench compare -- $(PARTS) $(if $(ROUNDS),--rounds $(ROUNDS)) \
		$(if $(SECONDS),--seconds $(SECONDS)) $(BENCH_ARGS) \
		$(if $(WITHOUT_INTENTS),--other $(TARGET)/release/diptych-without-intents --other-name 'no intents')
	$(if $(PARTS),,cargo bench --locked --bench hot)
