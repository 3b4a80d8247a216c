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
local amount, member, lease = tonumber(ARGV[1]), ARGV[2], tonumber(ARGV[3])

local function fits(c, p, n, limit)
  return limit < 0 or p * (W - elapsed) + (c + n) * W <= limit * W
end

local function exclusive(score) return string.format('(%.0f', score) end

-- A lease beyond `latest` is not ours, or the clock was set back.
local latest = now + lease + 1000000

local function running(key)
  local count = redis.pcall('ZCOUNT', key, exclusive(now), latest)
  if failed(count) then redis.call('DEL', key) return 0 end
  return count
end

local verdict, full = 0, 0
local answer = {0, index, elapsed}
for i = 0, #KEYS / 3 - 1 do
  local requests, tokens, most = tonumber(ARGV[3 * i + 4]), tonumber(ARGV[3 * i + 5]), tonumber(ARGV[3 * i + 6])
  local rc, rp, tc, tp = 0, 0, 0, 0
  if requests >= 0 then rc, rp = read(KEYS[3 * i + 1]) end
  if tokens >= 0 then tc, tp = read(KEYS[3 * i + 2]) end
  if not (fits(rc, rp, 1, requests) and fits(tc, tp, amount, tokens)) then verdict = 1
  elseif most >= 0 and full == 0 and running(KEYS[3 * i + 3]) >= most then full = i + 2 end
  local n = 4 * i + 3
  answer[n + 1], answer[n + 2], answer[n + 3], answer[n + 4] = rc, rp, tc, tp
end
if verdict == 0 then verdict = full end
answer[1] = verdict
if verdict ~= 0 then return answer end

-- Nothing was written before the request is taken, and removing comes last: a full Redis lets a script that has written
-- go on, and it should rather say that it is full.
for i = 0, #KEYS / 3 - 1 do
  local n = 4 * i + 3
  if tonumber(ARGV[3 * i + 4]) >= 0 then
    answer[n + 1] = answer[n + 1] + 1
    write(KEYS[3 * i + 1], answer[n + 1], answer[n + 2])
  end
  if tonumber(ARGV[3 * i + 5]) >= 0 then
    answer[n + 3] = answer[n + 3] + amount
    write(KEYS[3 * i + 2], answer[n + 3], answer[n + 4])
  end
  if tonumber(ARGV[3 * i + 6]) >= 0 then
    local key = KEYS[3 * i + 3]
    redis.call('ZADD', key, now + lease, member)
    redis.call('PEXPIRE', key, math.ceil(lease / 1000) + 1000)
    redis.call('ZREMRANGEBYSCORE', key, '-inf', now)
    redis.call('ZREMRANGEBYSCORE', key, exclusive(latest), '+inf')
  end
end
return answer
"""

_RELEASE = """
local amount, from, windows, member = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4]
local wrong
for i = 1, windows do
  local c, p = read(KEYS[i])
  if amount >= 0 or from == index then c = math.max(0, c + amount)
  elseif from == index - 1 then p = math.max(0, p + amount) end
  local written, problem = pcall(write, KEYS[i], c, p)
  if not written then wrong = problem end
end
-- A full Redis does not count any more, but still lets go of places.
for i = windows + 1, #KEYS do redis.pcall('ZREM', KEYS[i], member) end
if wrong then return redis.error_reply(type(wrong) == 'table' and wrong.err or tostring(wrong)) end
if windows == 0 then return 0 end
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


HOLD, RELEASE, KEEP = SCRIPTS = Script(_HOLD), Script(_RELEASE), Script(_KEEP)
"""HOLD has three keys for each scope, and takes the tokens, the member, the lease in microseconds, and for each scope the limits
of requests, tokens and running ones (-1: none). It answers the verdict, the minute's number, microseconds into it, and for
each scope both windows. Verdicts: 0, taken; 1, a window of some scope is full; n + 2, all places of scope n are.
RELEASE takes an amount to count, the minute it is taken out of when it is negative, how many of the keys are windows to count
it in, and the member whose places the other keys hold. What only frees places answers a number, as it proves nothing.
KEEP takes the lease and members.
"""
