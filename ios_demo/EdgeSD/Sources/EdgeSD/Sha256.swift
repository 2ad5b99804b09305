/// SHA-256 (FIPS 180-4). CryptoKit is Apple's alone; the tests of this package run on Linux too.
public struct Sha256 {
    private var state: [UInt32] = [
        0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19,
    ]
    private var rest: [UInt8] = []
    private var length: UInt64 = 0

    public init() {}

    public static func hex(_ data: some Sequence<UInt8>) -> String {
        var hash = Sha256()
        hash.update(Array(data))
        return hash.finish().map { byte in
            let text = String(byte, radix: 16)
            return text.count == 1 ? "0" + text : text
        }.joined()
    }

    public mutating func update(_ data: [UInt8]) {
        length += UInt64(data.count)
        var at = 0
        if !rest.isEmpty {
            at = min(64 - rest.count, data.count)
            rest += data[..<at]
            guard rest.count == 64 else { return }
            rest.withUnsafeBufferPointer { Sha256.block(&state, $0.baseAddress!) }
            rest = []
        }
        data.withUnsafeBufferPointer { bytes in
            while data.count - at >= 64 {
                Sha256.block(&state, bytes.baseAddress! + at)
                at += 64
            }
        }
        rest = Array(data[at...])
    }

    /// The 32 bytes of the digest. Nothing may be added afterwards.
    public mutating func finish() -> [UInt8] {
        let bits = length * 8
        update([0x80] + [UInt8](repeating: 0, count: (119 - Int(length % 64)) % 64))
        update(withUnsafeBytes(of: bits.bigEndian) { Array($0) })
        return state.flatMap { word in withUnsafeBytes(of: word.bigEndian) { Array($0) } }
    }

    private static func block(_ state: inout [UInt32], _ bytes: UnsafePointer<UInt8>) {
        withUnsafeTemporaryAllocation(of: UInt32.self, capacity: 64) { w in
            for i in 0..<16 {
                w[i] = UnsafeRawPointer(bytes).loadUnaligned(fromByteOffset: 4 * i, as: UInt32.self).bigEndian
            }
            for i in 16..<64 {
                let (far, near): (UInt32, UInt32) = (w[i - 15], w[i - 2])
                let s0: UInt32 = turned(far, 7) ^ turned(far, 18) ^ (far >> 3)
                let s1: UInt32 = turned(near, 17) ^ turned(near, 19) ^ (near >> 10)
                w[i] = w[i - 16] &+ s0 &+ w[i - 7] &+ s1
            }
            var (a, b, c, d) = (state[0], state[1], state[2], state[3])
            var (e, f, g, h) = (state[4], state[5], state[6], state[7])
            for i in 0..<64 {
                let s1: UInt32 = turned(e, 6) ^ turned(e, 11) ^ turned(e, 25)
                let choice: UInt32 = (e & f) ^ (~e & g)
                let first: UInt32 = h &+ s1 &+ choice &+ constants[i] &+ w[i]
                let s0: UInt32 = turned(a, 2) ^ turned(a, 13) ^ turned(a, 22)
                let majority: UInt32 = (a & b) ^ (a & c) ^ (b & c)
                let second: UInt32 = s0 &+ majority
                (h, g, f, e, d, c, b, a) = (g, f, e, d &+ first, c, b, a, first &+ second)
            }
            for (i, word) in [a, b, c, d, e, f, g, h].enumerated() { state[i] = state[i] &+ word }
        }
    }

    private static func turned(_ x: UInt32, _ bits: UInt32) -> UInt32 { x >> bits | x << (32 - bits) }

    private static let constants: [UInt32] = [
        0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5, 0xd807aa98,
        0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174, 0xe49b69c1, 0xefbe4786,
        0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da, 0x983e5152, 0xa831c66d, 0xb00327c8,
        0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967, 0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13,
        0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85, 0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819,
        0xd6990624, 0xf40e3585, 0x106aa070, 0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a,
        0x5b9cca4f, 0x682e6ff3, 0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7,
        0xc67178f2,
    ]
}
