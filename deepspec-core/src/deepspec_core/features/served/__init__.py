"""Features from servers: the target runs in serving engines, which write what it computed into a shared folder.

layers.py          which of the engine's layers are asked for, and where a draft's taps stand among them
answer_place.py    where an answer's file may lie, and waiting until the engine has written it
answer_file.py     reading one answer's file, and checking it
exchange.py        the shared folder: whose files are whose, and how much of it this process fills
final_norm.py      whether the last state is normed already, and norming it
asking.py          what is asked of one server, as the work of a farm (servers/farm.py)
answered.py        the same with an answer, so that the target reads a conversation once
stream.py          the features of many samples, in order, read ahead of whoever uses them
source.py          the feature source of training
server_probe.py    comparing servers with the target in this process, or with each other
stage_record.py    what servers gave when a stage was begun, which they have to give as long as it goes on
"""
