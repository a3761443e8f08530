"""The cloud's half: what arrived, the plan of rounds, the top model's training, checkpoints."""
