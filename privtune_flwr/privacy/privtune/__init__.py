"""The mechanism ``privtune`` (*reconstruction*): bank, graph, targets, importance, posterior."""
