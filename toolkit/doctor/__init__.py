"""`toolkit doctor`: what would stop or slow a job, found on every node before its ranks start.

Each check gives findings (`findings`): what, where, why it matters, how to mend it. A node looks at itself (`host`,
`software`, `gpus`, `disks`, `recipe`); several meet at the first one (`meeting`), measure what lies between them
(`links`, `collectives`) and compare what they are made of (`compare`). Whatever may hang is a process of its own
(`probes`), which is left behind when its time is over. Nothing here imports torch but those.
"""
