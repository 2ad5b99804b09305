import Foundation

/// What noise is for: a part of its key, so that one use never shifts another. Numbers are frozen.
public enum Purpose: UInt32, Sendable {
    /// Start latents; row 0.
    case start = 0
    /// What a stochastic sampler adds after a row.
    case step = 1
    /// A start image to the noise of its start row.
    case renoise = 2
    /// Sampling the VAE encoder's posterior.
    case posterior = 3
}

/// Standard normals keyed by (seed, image, row, purpose), never by draw order: Philox4x32-10 with Box-Muller in float64,
/// rounded to float32 once (edgesd/runtime/noise.py has the exact layout).
public struct Philox: Sendable {
    public static let maxSeed = (1 << 53) - 1
    public let seed: Int

    public init(seed: Int) throws {
        self.seed = try checkSeed(seed)
    }

    public func normal(_ shape: [Int], image: UInt32 = 0, row: UInt32, purpose: Purpose) -> Tensor {
        let count = shape.reduce(1, *)
        let key = (UInt32(truncatingIfNeeded: seed), UInt32(truncatingIfNeeded: seed >> 32))
        var values: [Float] = []
        values.reserveCapacity(count + 3)
        for block in 0..<UInt32((count + 3) / 4) {
            let words = Philox.words((block, image, row, purpose.rawValue), key)
            for (first, second) in [(words.0, words.1), (words.2, words.3)] {
                let unit: Double = (Double(first) + 1) * 0x1p-32
                let radius: Double = (-2 * log(unit)).squareRoot()
                let angle: Double = Philox.turn * Double(second)
                values.append(Float(radius * cos(angle)))
                values.append(Float(radius * sin(angle)))
            }
        }
        return Tensor(shape, Array(values.prefix(count)))
    }

    private static let turn: Double = 2 * Double.pi * 0x1p-32

    typealias Words = (UInt32, UInt32, UInt32, UInt32)

    /// Ten rounds (Salmon et al. 2011).
    static func words(_ counter: Words, _ key: (UInt32, UInt32)) -> Words {
        var (c, k) = (counter, key)
        for _ in 0..<10 {
            let wide0 = c.0.multipliedFullWidth(by: 0xD251_1F53), wide1 = c.2.multipliedFullWidth(by: 0xCD9E_8D57)
            c = (wide1.high ^ c.1 ^ k.0, wide1.low, wide0.high ^ c.3 ^ k.1, wide0.low)
            k = (k.0 &+ 0x9E37_79B9, k.1 &+ 0xBB67_AE85)
        }
        return c
    }
}

/// The seed, or RequestError when it is not in 0 .. 2^53-1.
func checkSeed(_ seed: Int) throws -> Int {
    guard (0...Philox.maxSeed).contains(seed) else {
        throw requestError("seed \(seed)", "an integer from 0 to \(Philox.maxSeed)", "Choose a seed in that range")
    }
    return seed
}
