"""What a cloud reads from federated updates: the baselines' side of the privacy column.

The adversary is the cloud of a federated baseline, honest but curious. It knows the pretrained
model, the state it sent, the settings (optimiser, rates, schedule, batch size, epochs), the
tokenizer and how many examples each device said it has; it sees each device's answer, the weights
after local training. Of the text it knows nothing beyond public text. No Flower in here.
"""
