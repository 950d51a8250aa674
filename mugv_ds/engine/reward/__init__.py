"""Online learning from a reward: rounds of rollouts, rewards and updates."""
