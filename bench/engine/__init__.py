"""What every task runs on: questions, records, the store, evaluation, scheduling, and the machine."""
