"""The checklist before training: is the data what it should be, and does the network learn at all?"""
