"""The scripts by which all processes count together in Redis; limits_local has the same arithmetic.

Only numbers that a script wrote are counted with: a key that holds anything else is deleted, and its window begins anew.
"""

from __future__ import annotations

import hashlib

_PRELUDE = """
local W = 60000000
local clock = redis.call('TIME')
local now = clock[1] * 1000000 + clock[2]
local index = math.floor(now / W)
local elapsed = now - index * W

local function failed(reply) return type(reply) == 'table' and reply.err end

local function number(text)
  if type(text) == 'string' and #text <= 15 and text:match('^%d+$') then return tonumber(text) end
end

local function read(key)
  local row = redis.pcall('HMGET', key, 'w', 'c', 'p')
  if failed(row) then redis.call('DEL', key) return 0, 0 end
  local w, c, p = number(row[1]), number(row[2]), number(row[3])
  if not (w and c and p) then
    if row[1] or row[2] or row[3] then redis.call('DEL', key) end
    return 0, 0
  end
  if w == index then return c, p end
  if w == index - 1 then return 0, c end
  return 0, 0
end

local function write(key, c, p)
  redis.call('HSET', key, 'w', index, 'c', c, 'p', p)
  redis.call('PEXPIRE', key, 120000)
end
"""

_HOLD = """
local requests, tokens, most = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local amount, member, lease = tonumber(ARGV[4]), ARGV[5], tonumber(ARGV[6])

local function fits(c, p, n, limit)
  return limit < 0 or p * (W - elapsed) + (c + n) * W <= limit * W
end

local function exclusive(score) return string.format('(%.0f', score) end

-- Nothing is written before the request is taken, and removing comes last: a full Redis lets a script that has written
-- go on, and it should rather say that it is full. A lease beyond `latest` is not ours, or the clock was set back.
local latest = now + lease + 1000000
local rc, rp, tc, tp, running = 0, 0, 0, 0, 0
if requests >= 0 then rc, rp = read(KEYS[1]) end
if tokens >= 0 then tc, tp = read(KEYS[2]) end
if most >= 0 then
  running = redis.pcall('ZCOUNT', KEYS[3], exclusive(now), latest)
  if failed(running) then redis.call('DEL', KEYS[3]) running = 0 end
end

local verdict = 0
if not fits(rc, rp, 1, requests) then verdict = 1
elseif not fits(tc, tp, amount, tokens) then verdict = 2
elseif most >= 0 and running >= most then verdict = 3
else
  if requests >= 0 then rc = rc + 1 write(KEYS[1], rc, rp) end
  if tokens >= 0 then tc = tc + amount write(KEYS[2], tc, tp) end
  if most >= 0 then
    redis.call('ZADD', KEYS[3], now + lease, member)
    redis.call('PEXPIRE', KEYS[3], math.ceil(lease / 1000) + 1000)
    redis.call('ZREMRANGEBYSCORE', KEYS[3], '-inf', now)
    redis.call('ZREMRANGEBYSCORE', KEYS[3], exclusive(latest), '+inf')
  end
end
return {verdict, index, elapsed, rc, rp, tc, tp}
"""

_ADD = """
local amount, from = tonumber(ARGV[1]), tonumber(ARGV[2])
local c, p = read(KEYS[1])
if amount >= 0 or from == index then c = math.max(0, c + amount)
elseif from == index - 1 then p = math.max(0, p + amount) end
write(KEYS[1], c, p)
return {}
"""

_KEEP = """
local lease = tonumber(ARGV[1])
if failed(redis.pcall('ZADD', KEYS[1], now + lease, ARGV[2])) then redis.call('DEL', KEYS[1]) end
for i = 2, #ARGV do redis.call('ZADD', KEYS[1], now + lease, ARGV[i]) end
redis.call('PEXPIRE', KEYS[1], math.ceil(lease / 1000) + 1000)
return {}
"""


class Script:
    """A Lua script, which Redis knows by its digest."""

    def __init__(self, body: str) -> None:
        self.source = (_PRELUDE + body).encode()
        self.digest = hashlib.sha1(self.source, usedforsecurity=False).hexdigest()


HOLD, ADD, KEEP = SCRIPTS = Script(_HOLD), Script(_ADD), Script(_KEEP)
"""HOLD takes the limits of requests, tokens and running ones (-1: none), tokens, member and lease in microseconds. It answers
the verdict (0: taken, else which of the three limits), the minute's number, microseconds into it, and both windows.
ADD takes an amount, and the minute it is taken out of when it is negative. KEEP takes the lease and members.
"""
